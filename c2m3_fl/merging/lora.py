"""Low-rank adapters on one shared base, averaged as what they add to it.

An adapter adds B A to a weight. The mean of B times the mean of A is not the mean of the products: it mixes every
client's B with every other's A. The mean of the products has rank n r at most; its factors are B's side by side and
A's on top of each other, and their QR decompositions leave a core of n r rows whose singular values give the best
approximation of rank r (Eckart and Young, 1936). No matrix of the base's size is made.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from c2m3_fl.core.spec import Params
from c2m3_fl.errors import ConfigError

FACTOR = re.compile(r"(lora_(?:embedding_)?)([AB])(?![A-Za-z0-9_])")  # in a tensor's name
_GROWTH = 2.0  # largest A in those of the nodes: where B's nearly cancel A would explode, and the factors are balanced


@dataclass(frozen=True, eq=False)
class Factors:
    """Two factors of a matrix.

    Attributes
    ----------
    left : Tensor, shape (rows, rank)
        B of an adapter.
    right : Tensor, shape (rank, columns)
        A of an adapter.
    lost : float
        Share of the exact mean's norm that is not in their product.
    """

    left: Tensor
    right: Tensor
    lost: float = 0.0


def adapter_pairs(names: Iterable[str]) -> list[tuple[str, str]]:
    """The pairs (A, B) of adapters among the names of a state dict: alike but for ``lora_A`` and ``lora_B``.

    Those of embeddings are called ``lora_embedding_A`` and ``lora_embedding_B``.

    Raises
    ------
    ConfigError
        For an A without its B, or a B without its A.
    """
    known = [name for name in names if FACTOR.search(name)]
    partner = {name: FACTOR.sub(lambda found: found[1] + {"A": "B", "B": "A"}[found[2]], name) for name in known}
    lonely = [name for name in known if partner[name] not in partner]
    if lonely:
        raise ConfigError(f"adapters come in pairs lora_A and lora_B: {lonely[:5]} has no partner among the arrays")
    return [(name, partner[name]) for name in known if _is_down(name)]


def check_adapters(params: Params) -> list[tuple[str, str]]:
    """The pairs (A, B) of a state dict, whose products are matrices.

    Raises
    ------
    ConfigError
        For an adapter without its partner, one whose factors have no product, and where there is none.
    """
    pairs = adapter_pairs(params)
    if not pairs:
        raise ConfigError(f"there are no adapters, named lora_A and lora_B, among the arrays {list(params)[:5]} …")
    for down, up in pairs:
        first, second = params[down].shape, params[up].shape
        if min(len(first), len(second)) < 2 or first[0] != second[1] or any(size != 1 for size in second[2:]):
            raise ConfigError(
                f"{down!r} has shape {tuple(first)} and {up!r} {tuple(second)}: no adapter of linear maps, whose "
                "shapes are (rank, columns) and (rows, rank)"
            )
    return pairs


def average_adapters(nodes: Sequence[Params], weights: Sequence[float]) -> dict[str, Tensor]:
    """A and B of every adapter, whose product is the best approximation to the weighted mean of the nodes' products.

    Parameters
    ----------
    nodes : sequence of mappings of str to Tensor
        State dicts that hold adapters of one rank on one base, under names with ``lora_A`` (rank, columns) and
        ``lora_B`` (rows, rank). Those of convolutions have A of a kernel's shape, and B of kernel size one.
    weights : sequence of float
        Averaging weights, on any scale.

    Raises
    ------
    ConfigError
        See `check_adapters`.
    """
    found: dict[str, Tensor] = {}
    for down, up in check_adapters(nodes[0]):
        mean = average_products([factors_of(each, down, up) for each in nodes], weights)
        found |= {down: mean.right.view_as(nodes[0][down]), up: mean.left.view_as(nodes[0][up])}
    return found


def residuals(nodes: Sequence[Params], weights: Sequence[float], found: Params) -> dict[str, Tensor]:
    """What adapters leave out of the weighted mean of the nodes' products: matrices of the base's size, by A's name.

    Added to the base's weights, times the adapter's scale, they make the model exactly that of the mean of the
    products. Clients that never receive the base cannot use them: then they serve the model that is merged in the end.
    Source: Singhal et al., FedEx-LoRA (2024).

    Parameters
    ----------
    nodes : sequence of mappings of str to Tensor
        State dicts that hold adapters.
    weights : sequence of float
        Averaging weights, on any scale.
    found : mapping of str to Tensor
        The adapters that take the nodes' place: those of `average_adapters`, say.

    Examples
    --------
    >>> nodes = [{"lora_A": torch.randn(2, 5), "lora_B": torch.randn(4, 2)} for _ in range(3)]
    >>> adapter = average_adapters(nodes, [1, 1, 1])
    >>> rest = residuals(nodes, [1, 1, 1], adapter)["lora_A"]
    >>> mean = sum(each["lora_B"] @ each["lora_A"] for each in nodes) / 3
    >>> torch.allclose(adapter["lora_B"] @ adapter["lora_A"] + rest, mean, atol=1e-5)
    True
    """
    share = _shares(weights)
    rests = {}
    for down, up in check_adapters(found):
        own = factors_of(found, down, up)
        rest = -(own.left.double() @ own.right.double())
        for part, each in zip(share.tolist(), nodes, strict=True):
            factors = factors_of(each, down, up)
            rest += part * (factors.left.double() @ factors.right.double())
        rests[down] = rest.to(own.left.dtype)
    return rests


def factors_of(params: Params, down: str, up: str) -> Factors:
    """The adapter of these names, as matrices."""
    return Factors(params[up].flatten(1), params[down].flatten(1))


def _shares(weights: Sequence[float]) -> Tensor:
    share = torch.tensor(list(weights), dtype=torch.float64)
    return share / share.sum()


def _is_down(name: str) -> bool:
    found = FACTOR.search(name)
    return found is not None and found[2] == "A"


def average_products(products: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """Factors of the best approximation, of the products' own rank, to their weighted mean.

    Of all factors with that product the left one is the mean left factor inside the best subspace: products that
    are alike come back with the factors that they had. Where the left factors (nearly) cancel, both factors
    are of one size.

    Parameters
    ----------
    products : sequence of Factors
        Of one shape and rank.
    weights : sequence of float
        On any scale.
    """
    share = _shares(weights)
    first, rank = products[0].left, products[0].left.shape[1]
    lefts = [float(part) * each.left.double() for part, each in zip(share, products, strict=True)]
    mean = sum(lefts[1:], lefts[0])
    rows, rest = torch.linalg.qr(torch.cat(lefts, dim=1))
    columns, other = torch.linalg.qr(torch.cat([each.right.double() for each in products]).T)
    left, sizes, right = torch.linalg.svd(rest @ other.T)
    basis, kept = rows @ left[:, :rank], sizes[:rank]
    span = (columns @ right[:rank].T).T
    lost = float(sizes[rank:].norm() / sizes.norm()) if float(sizes[0]) > 0 else 0.0
    found = _near_mean(basis, kept, span, mean)
    largest = max(float(each.right.double().norm()) for each in products)
    if found is None or float(found[1].norm()) > _GROWTH * largest:
        found = _balanced(basis, kept, span, products, share)
    return Factors(found[0].to(first.dtype), found[1].to(first.dtype), lost)


def _near_mean(basis: Tensor, sizes: Tensor, span: Tensor, mean: Tensor) -> tuple[Tensor, Tensor] | None:
    """The mean left factor inside the best subspace, and what gives the product with it; None where it cancels."""
    inside = basis.T @ mean
    right, fault = torch.linalg.solve_ex(inside, sizes[:, None] * span)
    return None if bool(fault) or not bool(right.isfinite().all()) else (basis @ inside, right)


def _balanced(
    basis: Tensor, sizes: Tensor, span: Tensor, products: Sequence[Factors], share: Tensor
) -> tuple[Tensor, Tensor]:
    """Factors of one size; what the product does not need stays trainable: the mean A, times zeros in B."""
    needed = sizes > 1e-7 * sizes[0].clamp(min=1e-300)
    root = torch.where(needed, sizes, 0.0).sqrt()
    mean = sum(
        (float(part) * each.right.double() for part, each in zip(share, products, strict=True)),
        torch.zeros_like(span),
    )
    return basis * root, torch.where(needed[:, None], root[:, None] * span, mean)
