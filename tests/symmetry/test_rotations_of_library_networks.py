"""Kinds of the groups of tiny networks of the transformers library, as a reader expects them."""

from __future__ import annotations

import pytest
import torch

from c2m3_fl import permutation_spec
from c2m3_fl.symmetry import find_folding

transformers = pytest.importorskip("transformers", reason="installed by the extra dev alone")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning")]

TOKENS = {"input_ids": torch.arange(12).reshape(2, 6)}
BERT = {
    "vocab_size": 20,
    "hidden_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 3,
    "intermediate_size": 10,
    "max_position_embeddings": 8,
}
GPT2 = {"vocab_size": 20, "n_embd": 12, "n_layer": 1, "n_head": 3, "n_positions": 8, "n_inner": 10}
LLAMA = {**BERT, "hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
CASES = {
    # name: model, configuration, groups by size and kind, number of norms that are folded
    "BERT": (  # the norms' outputs are the stream, but the last, which the pooler, with a tanh, reads
        "BertForSequenceClassification",
        ("BertConfig", BERT),
        {
            "stream": (12, "P"),
            "heads": (3, "P"),
            "keys": (12, "O"),
            "values": (12, "O"),
            "hidden": (10, "P"),
            "pooler": (12, "P"),
        },
        1,
    ),
    "GPT-2, tied": (  # the table of tokens is the head, and cannot take the last norm's scale
        "GPT2LMHeadModel",
        ("GPT2Config", GPT2),
        {"stream": (12, "P"), "heads": (3, "P"), "keys": (12, "O"), "values": (12, "O"), "hidden": (10, "P")},
        2,
    ),
    "GPT-2, untied": (
        "GPT2LMHeadModel",
        ("GPT2Config", {**GPT2, "tie_word_embeddings": False}),
        {"stream": (12, "C"), "heads": (3, "P"), "keys": (12, "O"), "values": (12, "O"), "hidden": (10, "P")},
        3,
    ),
    "Llama": (  # rotary positions pin queries and keys; two heads share their keys and values
        "LlamaForCausalLM",
        ("LlamaConfig", {**LLAMA, "tie_word_embeddings": False}),
        {"stream": (16, "O"), "pairs": (2, "P"), "heads": (4, "P"), "values": (8, "O"), "hidden": (10, "P")},
        3,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_groups_are_of_the_expected_kinds(name):
    architecture, (kind, options), groups, folded = CASES[name]
    torch.manual_seed(0)
    network = getattr(transformers, architecture)(getattr(transformers, kind)(**options)).eval()
    spec = permutation_spec(network, TOKENS, outputs="logits", rotations=True)
    found = sorted((group.size, group.kind[0].upper()) for group in spec.groups.values())
    assert found == sorted(groups.values())
    assert len(find_folding(network, TOKENS, outputs="logits").norms) == folded
