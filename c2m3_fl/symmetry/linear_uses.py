"""Which units are read by linear operators alone: they are coordinates of a space that may be rotated.

For every call of a graph it is noted which units the operator reads one by one (nonlinearities, products of
coordinates, scales of norms that are not folded), and which it pools (means over all of them), so that rotations have
to keep the vector of ones. Operators that are not named here read all units one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from c2m3_fl.symmetry.facts import Structure
from c2m3_fl.symmetry.labels import Labels, support
from c2m3_fl.symmetry.rules import reshape
from c2m3_fl.symmetry.rules.contraction import einsum_terms
from c2m3_fl.symmetry.rules.reduction import every
from c2m3_fl.symmetry.rules.registry import RULES, tensors

_OTHERS = (
    "dropout feature_dropout native_dropout neg positive index_select embedding clone contiguous detach alias "
    "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d "
    "zeros_like ones_like full_like new_zeros new_ones new_full rand_like randn_like"
)
_CARRY = {name for name, apply in RULES.items() if apply.__module__ == reshape.__name__}  # they move entries
_CARRY |= {f"aten.{name}" for name in _OTHERS.split()}
_PADS = {name for name in _CARRY if "pad" in name}
_CASTS = frozenset({"aten.to", "aten._to_copy", "aten.type_as", "aten.contiguous", "aten.clone", "aten.detach"})
_CONVOLUTIONS = frozenset(f"aten.conv{kind}{d}d" for kind in ("", "_transpose") for d in (1, 2, 3))
_PRODUCTS = frozenset({"aten.linear", "aten.matmul", "aten.mm", "aten.bmm", "aten.mv", "aten.einsum"})
_PRODUCTS_ADDED = frozenset({"aten.addmm", "aten.baddbmm"})

Arguments = Sequence[Any]


@dataclass(frozen=True, eq=False)
class Use:
    """One call of an operator.

    Attributes
    ----------
    structure : Structure
        The object that takes what is found.
    node : fx.Node
        The call.
    name : str
        Name of its rule.
    args : sequence
        Its arguments, tensors replaced by their labels.
    kwargs : dict
        Its further arguments, likewise.
    """

    structure: Structure
    node: fx.Node
    name: str
    args: Arguments
    kwargs: dict[str, Any]

    def singly(self, *operands: Labels) -> None:
        """Note that all units of these tensors are read one by one."""
        for x in operands:
            for factor in x.factors:
                self.structure.read_singly(factor)

    def everything(self) -> None:
        """Note the same of all arguments."""
        self.singly(*tensors([*self.args, *self.kwargs.values()]))


def note_use(use: Use, folded: Collection[str]) -> None:
    """Note what one call reads one by one, and what it pools.

    Parameters
    ----------
    use : Use
        The call.
    folded : collection of str
        The scales of norms that are folded, by their first names.
    """
    try:
        _RULES.get(use.name, _unknown)(use, folded)
    except (ValueError, IndexError, TypeError, KeyError, AttributeError):  # a form of the operator that is not known
        use.everything()


def _unknown(use: Use, _: Collection[str]) -> None:
    use.everything()


def _carry(use: Use, _: Collection[str]) -> None:
    """Operators that move entries, or mix them along other dimensions than that of the units."""


def _padded(use: Use, _: Collection[str]) -> None:
    """Margins of zeros, or of entries."""
    if any(isinstance(value, int | float) and value != 0 for value in (*use.args[2:], use.kwargs.get("value"))):
        use.everything()


def _convolution(use: Use, _: Collection[str]) -> None:
    """Sums over channels, in one group."""
    if len(use.args) > 6 and use.args[6] != 1:
        use.everything()


def _sum(use: Use, _: Collection[str]) -> None:
    """Sums of two tensors: both have the same units, or one number is added to all units of a tensor."""
    operands = [value for value in use.args[:2] if isinstance(value, Labels)]
    for x in operands:
        rest = [other for other in operands if other is not x]
        varying = set().union(*map(_varying, rest))
        for factor in x.factors:
            dims = _from_end(x, support(factor))
            if any(dims == _from_end(other, support(one)) for other in rest for one in other.factors):
                continue
            if dims & varying:
                use.structure.read_singly(factor)
            else:
                use.structure.pool(factor)


def _varying(x: Labels) -> set[int]:
    """The dimensions, counted from the end, along which a tensor may have several values: units, or ordered content."""
    if x.content is not None and x.content.size and bool((x.content == x.content.flat[0]).all()):
        return set()
    dims = range(x.ndim) if x.content is not None else x.fixed.union(*map(support, x.factors))
    return {dim - x.ndim for dim in dims if x.shape[dim] > 1}


def _scaled(use: Use, folded: Collection[str]) -> None:
    """Products: a factor that is the same for all units of a tensor leaves them in their space."""
    if len(use.node.all_input_nodes) == 1 and len(tensors(use.args)) == 2:
        _square(use, folded)
        return
    operands = tensors(use.args)
    if any(x.source in folded and x.source for x in operands):
        return
    for x in operands:
        for other in (other for other in operands if other is not x):
            for factor in x.factors:
                if _from_end(x, support(factor)) & _varying(other):
                    use.structure.read_singly(factor)
    if use.name == "aten.div":
        use.singly(*tensors(use.args[1:]))


def _square(use: Use, _: Collection[str]) -> None:
    """Squares whose sum along the units is all that is read: lengths, which no rotation changes."""
    exponent = use.args[1] if use.name == "aten.pow" else 2
    if exponent != 2 or not all(_adds_up(user, use.args[0]) for user in use.node.users):
        use.everything()


def _adds_up(node: fx.Node, squares: Labels) -> bool:
    """Whether a call sums or averages squares along a dimension of every factor."""
    name = _short(node)
    if name in _CASTS:
        return all(_adds_up(user, squares) for user in node.users)
    dims = set(every(squares, node.args[1] if len(node.args) > 1 else None))
    return name in ("aten.mean", "aten.sum") and all(support(factor) & dims for factor in squares.factors)


def _pooled(use: Use, _: Collection[str]) -> None:
    """Sums and means: along the units they see their component along the vector of ones alone."""
    x = use.args[0]
    if _is_square(use.node.all_input_nodes[0]):
        return
    dims = set(every(x, use.args[1] if len(use.args) > 1 else use.kwargs.get("dim")))
    for factor in x.factors:
        if support(factor) & dims:
            use.structure.pool(factor)


def _is_square(node: fx.Node) -> bool:
    while _short(node) in _CASTS:
        node = node.all_input_nodes[0]
    squared = _short(node) == "aten.mul" and len(node.all_input_nodes) == 1 and node.args[0] is node.args[1]
    return bool(squared or _short(node) == "aten.square" or (_short(node) == "aten.pow" and node.args[1] == 2))


def _spread(use: Use, _: Collection[str]) -> None:
    """Variances: as means, if they run along the units."""
    x = use.args[0]
    dims = use.args[1] if len(use.args) > 1 and not isinstance(use.args[1], bool) else use.kwargs.get("dim")
    for factor in x.factors:
        if support(factor) & set(every(x, dims)):
            use.structure.pool(factor)
        else:
            use.structure.read_singly(factor)


def _length(use: Use, _: Collection[str]) -> None:
    """Euclidean norms along the units."""
    x, order = use.args[0], use.args[1] if len(use.args) > 1 else 2
    dims = set(every(x, use.args[2] if len(use.args) > 2 else use.kwargs.get("dim")))
    for factor in x.factors:
        if order != 2 or not support(factor) & dims:
            use.structure.read_singly(factor)


def _norm(use: Use, folded: Collection[str]) -> None:
    """LayerNorm and RMSNorm: over the units, with a folded scale or none."""
    x, (scale, *_) = use.args[0], (*use.args[2:3], None)
    dims = set(range(x.ndim - len(use.args[1]), x.ndim))
    plain = scale is None or (isinstance(scale, Labels) and scale.source in folded)
    for factor in x.factors:
        if not plain or not support(factor) & dims:
            use.structure.read_singly(factor)
        elif use.name in ("aten.layer_norm", "aten.native_layer_norm"):
            use.structure.pool(factor)
    if not plain:
        use.singly(*tensors([scale]))


def _attention(use: Use, _: Collection[str]) -> None:
    """Queries, keys and values are summed along their last dimensions; the softmax reads all others one by one."""
    for x in tensors(use.args[:3]):
        for factor in x.factors:
            if x.ndim - 1 not in support(factor):
                use.structure.read_singly(factor)
    use.singly(*tensors([*use.args[3:], *use.kwargs.values()]))


def _masked(use: Use, _: Collection[str]) -> None:
    """Zeros in places that are the same for all units of a tensor."""
    x, mask, value = use.args
    if value != 0 or any(_from_end(x, support(factor)) & _varying(mask) for factor in x.factors):
        use.everything()


def _chosen(use: Use, _: Collection[str]) -> None:
    """Entries of one tensor or another, by a condition that is the same for all units of a tensor."""
    condition, *values = use.args
    told = _varying(condition)
    numbers = any(isinstance(value, int | float) and value != 0 for value in values)
    if numbers or any(_from_end(x, support(factor)) & told for x in tensors(values) for factor in x.factors):
        use.everything()
    elif len(tensors(values)) > 1:
        _sum(replace(use, args=values), frozenset())


def _product(use: Use, _: Collection[str]) -> None:
    """Sums of products: units are summed over together with the same units of the other operand."""
    bias = use.args[:1] if use.name in _PRODUCTS_ADDED else ()
    operands = tensors(use.args[len(bias) :])[:2] if use.name != "aten.einsum" else tensors(use.args)
    terms, output = _terms(use, operands)
    for place, (term, x) in enumerate(zip(terms, operands, strict=True)):
        others = [pair for other, pair in enumerate(zip(terms, operands, strict=True)) if other != place]
        shared = {term_[dim] for term_, y in others for dim, size in enumerate(y.shape) if size > 1}
        held = {term_[dim] for term_, y in others for factor in y.factors for dim in support(factor)}
        for factor in x.factors:
            indices = {term[dim] for dim in support(factor)}
            gone = indices - set(output)
            if (gone and not gone <= held) or (not gone and indices <= shared) or len(set(term)) < len(term):
                use.structure.read_singly(factor)


def _terms(use: Use, operands: Sequence[Labels]) -> tuple[list[list[Any]], list[Any]]:
    """An index for every dimension of the operands, and those of the result."""
    if use.name == "aten.einsum":
        return einsum_terms(use.args[0], operands)
    x, y = operands
    batch = [[dim - z.ndim for dim in range(z.ndim - 2)] for z in operands]
    left = ["k"] if x.ndim == 1 else [*batch[0], "i", "k"]
    if use.name == "aten.linear":
        return [left, ["j", "k"][-y.ndim :]], [*left[:-1], "j"]
    right = ["k"] if y.ndim == 1 else [*batch[1], "k", "j"]
    return [left, right], [*max(batch, key=len), "i", "j"]


def _from_end(x: Labels, dims: Collection[int]) -> set[int]:
    return {dim - x.ndim for dim in dims}


def _short(node: fx.Node) -> str:
    return ".".join(str(node.target).split(".")[:2])


_RULES: dict[str, Callable[[Use, Collection[str]], None]] = {
    **dict.fromkeys(_CARRY | _CASTS, _carry),
    **dict.fromkeys(_PADS, _padded),
    **dict.fromkeys(_PRODUCTS | _PRODUCTS_ADDED, _product),
    **dict.fromkeys(_CONVOLUTIONS, _convolution),
    **dict.fromkeys(("aten.add", "aten.sub", "aten.rsub"), _sum),
    **dict.fromkeys(("aten.mul", "aten.div", "aten.true_divide"), _scaled),
    **dict.fromkeys(("aten.pow", "aten.square"), _square),
    **dict.fromkeys(("aten.mean", "aten.sum"), _pooled),
    **dict.fromkeys(("aten.var", "aten.std", "aten.var_mean", "aten.std_mean"), _spread),
    **dict.fromkeys(("aten.linalg_vector_norm", "aten.norm"), _length),
    **dict.fromkeys(("aten.layer_norm", "aten.native_layer_norm", "aten.rms_norm", "aten._fused_rms_norm"), _norm),
    "aten.scaled_dot_product_attention": _attention,
    "aten.masked_fill": _masked,
    "aten.where": _chosen,
}
