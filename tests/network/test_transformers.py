"""Networks of the transformers library as they are, with adapters of peft: tiny and of random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from c2m3_fl import check_invariance, merge, permutation_spec
from c2m3_fl.cli.app import app
from c2m3_fl.core import permutation
from c2m3_fl.core.spec import PermutationSpec

transformers = pytest.importorskip("transformers", reason="installed by the extra dev alone")
peft = pytest.importorskip("peft", reason="installed by the extra dev alone")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning")]

TOKENS = torch.randint(1, 50, (2, 7), generator=torch.Generator().manual_seed(0))
MASK = torch.ones(2, 7, dtype=torch.long)
SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


def bert(**options: Any) -> nn.Module:
    """A classifier of sequences: 4 heads of 4 units, 24 units inside."""
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=24,
        max_position_embeddings=20,
        num_labels=3,
        **options,
    )
    return transformers.BertForSequenceClassification(config)


def gpt2(**options: Any) -> nn.Module:
    """A causal language model whose scores use the embeddings' weights."""
    config = transformers.GPT2Config(
        vocab_size=50, n_embd=16, n_layer=2, n_head=4, n_positions=20, n_inner=24, **SPECIAL, **options
    )
    return transformers.GPT2LMHeadModel(config)


def llama(**options: Any) -> nn.Module:
    """A causal language model with two key heads for four queries, rotary positions and RMSNorm."""
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=20,
        **SPECIAL,
        **options,
    )
    return transformers.LlamaForCausalLM(config)


def t5(**options: Any) -> nn.Module:
    """An encoder and a decoder."""
    config = transformers.T5Config(
        vocab_size=50, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, decoder_start_token_id=0, **options
    )
    return transformers.T5ForConditionalGeneration(config)


INPUTS: dict[Callable[..., nn.Module], dict[str, Tensor]] = {
    bert: {"input_ids": TOKENS, "attention_mask": MASK},
    gpt2: {"input_ids": TOKENS, "attention_mask": MASK},
    llama: {"input_ids": TOKENS, "attention_mask": MASK},
    t5: {"input_ids": TOKENS, "attention_mask": MASK, "labels": TOKENS},
}


def made(make: Callable[..., nn.Module], seed: int = 0, **options: Any) -> nn.Module:
    """A network in evaluation mode; its weights depend on the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make(**options).eval()


def checked(network: nn.Module, inputs: Any, **options: Any) -> PermutationSpec:
    """The spec, after random permutations of the weights have left the logits unchanged to single precision."""
    spec = permutation_spec(network, inputs, **options)
    assert check_invariance(network, spec, inputs, **options) < 1e-4
    before, expected = network.state_dict(), network(**inputs).logits
    perm = permutation.random(spec, torch.Generator().manual_seed(1))
    network.load_state_dict(permutation.apply(spec, perm, before))
    torch.testing.assert_close(network(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
    network.load_state_dict(before)
    return spec


@pytest.mark.parametrize("make", INPUTS)
def test_networks_are_traced_with_dicts_and_batch_encodings(make: Callable[..., nn.Module]) -> None:
    network, inputs = made(make), INPUTS[make]
    spec = checked(network, transformers.BatchEncoding(inputs), outputs="logits")
    heads = [name for name, group in spec.groups.items() if group.parent is None and group.size == 4]
    assert heads or make is llama, "heads of attention are blocks"
    inner = [name for name, group in spec.groups.items() if group.size == 24]
    assert len(inner) == (4 if make is t5 else 2), "the units inside the feed-forward layers"


@pytest.mark.parametrize(
    ("make", "options", "kinds"),
    [
        (bert, {}, "P POOP POOP P"),  # post-norm: the norms' outputs are the stream
        (gpt2, {}, "P POOP POOP"),  # the table of tokens is the head, and cannot take the last norm's scale
        (gpt2, {"tie_word_embeddings": False}, "C POOP POOP"),
        (llama, {}, "O PPOP PPOP"),  # RMSNorm; rotary positions order queries and keys; queries share keys
    ],
)
def test_streams_and_the_insides_of_heads_rotate(make: Callable[..., nn.Module], options: Any, kinds: str) -> None:
    network, inputs = made(make, **options), INPUTS[make]
    spec = permutation_spec(network, inputs, outputs="logits", rotations=True)
    assert "".join(group.kind[0].upper() for group in spec.groups.values()) == kinds.replace(" ", "")
    assert check_invariance(network, spec, inputs, outputs="logits") < 1e-9


def encoder_and_decoder() -> tuple[nn.Module, dict[str, Tensor]]:
    return t5(), INPUTS[t5]


@pytest.mark.parametrize(
    ("name", "arguments", "shown"),
    [
        ("bert", ["--input", "tokens:2,7"], "10 groups (4 nested); permutations move 99.94 % of 5,427 parameters"),
        ("gpt2", ["--input", "tokens:2,7"], "9 groups (4 nested); permutations move 100.00 % of 5,872 parameters"),
        ("llama", ["--input", "tokens:2,7"], "9 groups (4 nested); permutations move 100.00 % of 5,520 parameters"),
        ("encoder_and_decoder", [], "21 groups (12 nested); permutations move 100.00 % of 12,864 parameters"),
    ],
)
def test_inspect_shows_them(name: str, arguments: list[str], shown: str) -> None:
    command = ["inspect", f"{__name__}:{name}", *arguments, "--outputs", "logits"]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.stdout.startswith(f"{shown}\n")
    assert "cannot be proven" not in result.stdout
    assert "smallest change that a wrong permutation of one axis alone would cause" in result.stdout


@pytest.mark.parametrize("make", [bert, gpt2])
def test_the_residual_stream_moves_unless_hidden_states_are_read(make: Callable[..., nn.Module]) -> None:
    network, inputs = made(make), {**INPUTS[make], "output_hidden_states": True}
    streams = {
        name: group.size
        for name, group in checked(network, inputs, outputs="logits").groups.items()
        if group.size == 16
    }
    everything = permutation_spec(network, inputs)
    residual = {name for name in streams if everything.groups.get(name) is None}
    assert residual, "hidden states are outputs: the caller reads them in order"
    assert "network output" in {pin.reason for pin in everything.pins}


def test_tied_embeddings_stay_tied() -> None:
    first, second = made(gpt2, 0), made(gpt2, 1)
    nodes = [each.state_dict() for each in (first, second)]
    merged = merge(first, nodes, example_inputs=INPUTS[gpt2], outputs="logits").state_dict
    assert torch.equal(merged["lm_head.weight"], merged["transformer.wte.weight"])
    assert first.lm_head.weight is first.transformer.wte.weight


@pytest.mark.parametrize("make", INPUTS)
def test_a_permuted_copy_is_merged_into_the_network_and_recalibrated(make: Callable[..., nn.Module]) -> None:
    network, inputs = made(make), INPUTS[make]
    spec = permutation_spec(network, inputs, outputs="logits")
    node = network.state_dict()
    twin = permutation.apply(spec, permutation.random(spec, torch.Generator().manual_seed(0)), node)
    batches = [transformers.BatchEncoding(inputs)]
    merged = merge(network, [node, twin], spec=spec, calibration=batches, outputs="logits", recalibrate="repair")
    network.load_state_dict(merged.state_dict)
    found = network(**inputs).logits
    network.load_state_dict(node)
    torch.testing.assert_close(found, network(**inputs).logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(("make", "targets"), [(bert, ["query", "value"]), (llama, ["q_proj", "v_proj", "down_proj"])])
def test_adapters_move_with_what_they_adapt(make: Callable[..., nn.Module], targets: list[str], dora: bool) -> None:
    options = peft.LoraConfig(r=3, target_modules=targets, use_dora=dora)
    network = made(lambda: peft.get_peft_model(make(), options))
    for name, value in network.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(value.data, generator=torch.Generator().manual_seed(2))
    spec = checked(network, INPUTS[make], outputs="logits")
    ranks = [name for name, group in spec.groups.items() if group.size == 3]
    assert len(ranks) == 2 * len(targets), "the units between the two matrices of an adapter"
    assert any(group.size == 16 and group.parent is None for group in spec.groups.values()), "the residual stream"
