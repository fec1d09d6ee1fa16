"""Federations of networks of the transformers library: ``python -m simulations.examples.language``.

Three tiny Llamas learn one language from their own initial weights. Three clients adapt one BERT with LoRA. Needs
``pip install transformers peft``; all weights are random and nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg, Strategy
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from c2m3_fl import C2M3
from c2m3_fl.flower import SerialGrid

WORDS, LENGTH, CLIENTS = 16, 12, 3
Texts = dict[str, Tensor]  # a batch as the library's tokenizers give it


def llama(seed: int = 0) -> nn.Module:
    """A language model of one layer, two heads and 32 channels; its initial weights depend on `seed`."""
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    return _seeded(seed, lambda: LlamaForCausalLM(config))


def bert(seed: int = 0) -> nn.Module:
    """A classifier with frozen weights, the same for all seeds, and adapters and a last layer that depend on `seed`."""
    config = BertConfig(
        vocab_size=WORDS,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
    )
    config.num_labels = 2
    frozen = _seeded(0, lambda: BertForSequenceClassification(config))
    adapters = LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=16, target_modules=["query", "value", "dense"])
    return _seeded(seed, lambda: get_peft_model(frozen, adapters))


def sentences(count: int, seed: int) -> Texts:
    """Sentences in which nine of ten words are decided by the word before, and as labels the sentences themselves."""
    generator = torch.Generator().manual_seed(seed)
    follows = torch.randperm(WORDS, generator=torch.Generator().manual_seed(0))
    words = [torch.randint(WORDS, (count,), generator=generator)]
    for _ in range(LENGTH - 1):
        surprise = torch.rand(count, generator=generator) < 0.1
        words.append(torch.where(surprise, torch.randint(WORDS, (count,), generator=generator), follows[words[-1]]))
    tokens = torch.stack(words, dim=1)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}


def questions(count: int, seed: int) -> Texts:
    """Random words, and as label whether the first of all words, word 0, is among them."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(WORDS, (count, LENGTH), generator=generator)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": (tokens == 0).any(1).long()}


def train(network: nn.Module, texts: Texts, *, epochs: int, rate: float) -> None:
    """Train the parameters that are not frozen."""
    network.train()
    optimiser = torch.optim.AdamW([value for value in network.parameters() if value.requires_grad], lr=rate)
    for epoch in range(epochs):
        order = torch.randperm(len(texts["labels"]), generator=torch.Generator().manual_seed(epoch))
        for rows in torch.split(order, 32):
            optimiser.zero_grad()
            network(**{name: value[rows] for name, value in texts.items()}).loss.backward()
            optimiser.step()


def loss(network: nn.Module, texts: Texts) -> float:
    """Mean loss on held-out texts."""
    with torch.inference_mode():
        return float(network.eval()(**texts).loss)


def federate(
    make: Callable[[int], nn.Module],
    texts: Callable[[int, int], Texts],
    wrap: Callable[[Strategy], Strategy],
    *,
    rounds: int = 2,
    epochs: int = 8,
    rate: float = 5e-3,
) -> list[float]:
    """Loss of the global model after every round; in the first, every client trains initial weights of its own."""
    app = ClientApp()

    @app.train()
    def fit(message: Message, context: Context) -> Message:
        part = int(context.node_config["partition-id"])
        network = make(1 + part)
        if message.content.config_records["config"]["server-round"] != 1:
            network.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
        train(network, texts(256, 1 + part), epochs=epochs, rate=rate)
        arrays, metrics = ArrayRecord(network.state_dict()), MetricRecord({"num-examples": 256})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    network, found = make(0), []

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        network.load_state_dict(arrays.to_torch_state_dict())
        found.append(loss(network, texts(256, 0)))
        return MetricRecord({"loss": found[-1]})

    strategy = wrap(FedAvg(fraction_evaluate=0.0))
    arrays = ArrayRecord(make(0).state_dict())
    strategy.start(SerialGrid(app, CLIENTS), arrays, num_rounds=rounds, evaluate_fn=evaluate)
    return found[1:]


def aligned(make: Callable[[int], nn.Module], texts: Callable[[int, int], Texts], plain: Strategy) -> Strategy:
    """FedAvg of aligned replies: the network is traced with a batch as it is, and its logits are what is read."""
    batch = {name: value for name, value in texts(2, 0).items() if name != "labels"}
    return C2M3(plain, model=make(0), example_inputs=batch, outputs="logits")


def main() -> dict[str, list[float]]:
    """Both federations with FedAvg alone and with C2M3: the losses after every round."""
    found = {}
    for name, make, texts in (("llama", llama, sentences), ("bert with lora", bert, questions)):
        found[f"{name}, FedAvg"] = federate(make, texts, lambda plain: plain)
        found[f"{name}, C2M3"] = federate(make, texts, partial(aligned, make, texts))
    return found


def _seeded(seed: int, make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


if __name__ == "__main__":
    for name, losses in main().items():
        print(f"{name:22}", *(f"{value:.3f}" for value in losses))
