"""Low-rank adapters on one shared base, averaged as what they add to it.

An adapter adds B A to a weight. The mean of B times the mean of A is not the mean of the products: it mixes every
client's B with every other's A. The mean of the products has rank n r at most; its factors are B's side by side and
A's on top of each other, and their QR decompositions leave a core of n r rows whose singular values give the best
approximation of rank r (Eckart and Young, 1936). No matrix of the base's size is made.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from c2m3_fl.core.spec import Params
from c2m3_fl.errors import ConfigError

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

    Raises
    ------
    ConfigError
        For an A without its B, or a B without its A.
    """
    known = [name for name in names if "lora_A" in name or "lora_B" in name]
    partner = {
        name: name.replace("lora_A", "lora_B") if "lora_A" in name else name.replace("lora_B", "lora_A")
        for name in known
    }
    lonely = [name for name in known if partner[name] not in partner]
    if lonely:
        raise ConfigError(f"adapters come in pairs lora_A and lora_B: {lonely[:5]} has no partner among the arrays")
    return [(name, partner[name]) for name in known if "lora_A" in name]


def average_adapters(nodes: Sequence[Params], weights: Sequence[float]) -> dict[str, Tensor]:
    """A and B of every adapter, whose product is the best approximation to the weighted mean of the nodes' products.

    Parameters
    ----------
    nodes : sequence of mappings of str to Tensor
        State dicts that hold adapters of one rank on one base, under names with ``lora_A`` (rank, columns) and
        ``lora_B`` (rows, rank).
    weights : sequence of float
        Averaging weights, on any scale.

    Raises
    ------
    ConfigError
        For an adapter without its partner, or one whose factors are not matrices of one rank.
    """
    found: dict[str, Tensor] = {}
    for down, up in adapter_pairs(nodes[0]):
        rank, columns = nodes[0][down].shape, nodes[0][up].shape
        if len(rank) != 2 or len(columns) != 2 or rank[0] != columns[1]:
            raise ConfigError(
                f"{down!r} has shape {tuple(rank)} and {up!r} {tuple(columns)}: no adapter of linear maps"
            )
        mean = average_products([Factors(each[up], each[down]) for each in nodes], weights)
        found |= {down: mean.right, up: mean.left}
    return found


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
    share = torch.tensor(list(weights), dtype=torch.float64)
    share = share / share.sum()
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
