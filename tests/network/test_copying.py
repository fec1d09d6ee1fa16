"""Copies of wrapped, hooked and sparse networks."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from c2m3_fl import check_invariance, merge, permutation_spec
from c2m3_fl.errors import ParamsError, TraceError
from c2m3_fl.network.copying import in_precision, own_names, private_copy

INPUTS = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def plain() -> nn.Sequential:
    """Two hidden layers of 6 and 5 units."""
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))


def nested() -> nn.Module:
    """A network whose first layer is compiled."""
    network = plain()
    network[0] = torch.compile(network[0])
    return network


def weight_normed() -> nn.Module:
    """The old weight norm, whose weights are results of hooks that deepcopy refuses."""
    network = plain()
    nn.utils.weight_norm(network[0])
    network(INPUTS)
    return network


def pruned() -> nn.Module:
    """Half of a weight is masked."""
    network = plain()
    prune.random_unstructured(network[2], "weight", 0.5)
    network(INPUTS)
    return network


class Keeping(nn.Module):
    """Keeps the activations of its last call."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)
        self.seen: list[Tensor] = []
        self.forward(INPUTS)

    def forward(self, x: Tensor) -> Tensor:
        self.seen = [self.first(x).relu()]
        return self.last(self.seen[0])


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("make", "groups"),
    [
        (lambda: nn.DataParallel(plain()), {"module.0": 6, "module.2": 5}),
        (lambda: torch.compile(plain()), {"_orig_mod.0": 6, "_orig_mod.2": 5}),
        (lambda: nn.DataParallel(torch.compile(plain())), {"module._orig_mod.0": 6, "module._orig_mod.2": 5}),
        (nested, {"0._orig_mod": 6, "2": 5}),
        (weight_normed, {"0": 6, "2": 5}),
        (Keeping, {"first": 6}),
    ],
)
def test_wrapped_and_hooked_networks_have_the_groups_of_plain_ones(
    make: Callable[[], nn.Module], groups: dict[str, int]
) -> None:
    network = make()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    spec = permutation_spec(network, INPUTS)
    assert {name: group.size for name, group in spec.groups.items()} == groups
    assert check_invariance(network, spec, INPUTS) < 1e-12
    merged = merge(network, [before, before], calibration=[INPUTS], recalibrate="repair").state_dict
    assert list(merged) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_a_pruned_network_can_be_traced_and_proven() -> None:
    network = pruned()
    spec = permutation_spec(network, INPUTS)
    assert spec.groups
    assert check_invariance(network, spec, INPUTS) < 1e-12


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_state_dicts_of_wrapped_networks_fit_the_plain_one(prefix: str) -> None:
    network, order = plain(), torch.randperm(6)
    node = network.state_dict()
    twin = {**node, "0.weight": node["0.weight"][order], "0.bias": node["0.bias"][order]}
    twin["2.weight"] = node["2.weight"][:, order]
    found = merge(
        network, [node, {prefix + name: value for name, value in twin.items()}], example_inputs=INPUTS, basis=0
    ).state_dict
    assert all(torch.equal(found[name], node[name]) for name in node)
    assert list(own_names(nn.DataParallel(network), node)) == ["module." + name for name in node]


def test_state_dicts_with_other_names_are_left_alone() -> None:
    network = nn.ModuleDict({"module": nn.Linear(2, 2), "other": nn.Linear(2, 2)})
    for params in ({"weight": INPUTS}, {}, dict.fromkeys(["module.weight", "weight", "bias"], INPUTS), 3, None):
        assert own_names(network, params) is params


def test_a_copy_computes_the_same_and_shares_only_what_it_may() -> None:
    network = nn.DataParallel(plain()).eval()
    twin, sharing = private_copy(network), private_copy(network, share=True)
    assert torch.equal(twin(INPUTS), network(INPUTS))
    assert twin.module[0].out_features == 6
    names = dict(network.named_parameters())
    assert all(value is names[name] for name, value in sharing.named_parameters())
    assert all(value is not names[name] and torch.equal(value, names[name]) for name, value in twin.named_parameters())
    assert torch.equal(copy.deepcopy(twin)(INPUTS), network(INPUTS))


def test_what_cannot_be_copied_is_named() -> None:
    network = plain()
    network.lock = threading.Lock()
    with pytest.raises(TraceError, match=r"Sequential cannot be copied: .*lock"):
        permutation_spec(network, INPUTS)


class Graph(nn.Module):
    """One message along the edges of a constant graph, or of one that is an input."""

    def __init__(self, *, persistent: bool = False) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)
        self.register_buffer("edges", (torch.ones(3, 3) - torch.eye(3)).to_sparse(), persistent=persistent)

    def forward(self, x: Tensor, edges: Tensor | None = None) -> Tensor:
        given = self.edges if edges is None else edges
        return self.last(torch.sparse.mm(given, self.first(x)).relu())


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_sparse_inputs_and_constants_are_dense_in_a_trace(layout: torch.layout) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's sparse CSR tensors are in beta
        edges = torch.eye(3).roll(1, 0).to_sparse(layout=layout)
    for inputs in ((INPUTS, edges), {"x": INPUTS, "edges": edges}):
        spec = permutation_spec(Graph(), inputs)
        assert {name: group.size for name, group in spec.groups.items()} == {"first": 6}
    node = Graph().state_dict()
    merge(Graph(), [node, node], spec=spec, example_inputs=inputs, calibration=[inputs], recalibrate="repair")


def test_a_sparse_constant_is_dense_in_a_trace() -> None:
    spec = permutation_spec(Graph(), INPUTS)
    assert {name: group.size for name, group in spec.groups.items()} == {"first": 6}


def test_a_sparse_tensor_of_the_state_dict_is_refused_by_name() -> None:
    with pytest.raises(ParamsError, match=r"'edges' is a sparse tensor .* persistent=False"):
        permutation_spec(Graph(persistent=True), INPUTS)


def test_complex_parameters_keep_their_imaginary_part() -> None:
    network = nn.Linear(2, 2, dtype=torch.complex64)
    cast = in_precision(private_copy(network), torch.float64)
    assert cast.weight.dtype == torch.complex128
    assert torch.equal(cast.weight.to(torch.complex64), network.weight)
