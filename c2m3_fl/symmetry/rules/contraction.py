"""Rules of operators that sum over units: linear layers, matrix products, convolutions, attention, embeddings."""

from __future__ import annotations

from collections.abc import Sequence

from c2m3_fl.symmetry.labels import Labels
from c2m3_fl.symmetry.reshape_labels import copies, reshape
from c2m3_fl.symmetry.rules.matrix import diagonal
from c2m3_fl.symmetry.rules.registry import Argument, Call, Result, Rule, rule, unknown
from c2m3_fl.symmetry.unit_labels import align, combine, drop, einsum, in_order, insert, maximal, normalise, reduce


def produces(call: Call, weight: Labels, axis: int) -> None:
    """Note that the units of `weight` along `axis` are computed here."""
    if weight.source:
        call.structure.outputs.setdefault((weight.source, axis))


@rule("aten.linear")
def linear(call: Call, x: Labels, weight: Labels, bias: Labels | None = None) -> Labels:
    """Last dimension against the columns of the weight."""
    produces(call, weight, 0)
    batch = list(range(x.ndim - 1))
    row = ["o"] if weight.ndim == 2 else []
    found = einsum(call.structure, [[*batch, "i"], [*row, "i"]], [*batch, *row], [x, weight])
    return found if bias is None else combine(call.structure, found, bias)


@rule("aten.matmul", "aten.mm", "aten.bmm", "aten.mv", "aten.dot")
def matmul(call: Call, x: Labels, y: Labels) -> Labels:
    """Product of (batches of) matrices and vectors."""
    left, right = x.ndim == 1, y.ndim == 1
    x, y = insert(x, [0]) if left else x, insert(y, [1]) if right else y
    if not right:
        produces(call, y, 1)
    ndim = max(x.ndim, y.ndim)
    x, y = align(x, ndim), align(y, ndim)
    batch = list(range(ndim - 2))
    found = einsum(call.structure, [[*batch, "i", "k"], [*batch, "k", "j"]], [*batch, "i", "j"], [x, y])
    return drop(found, [ndim - 2] * left + [ndim - 1] * right)


@rule("aten.addmm", "aten.baddbmm", "aten.addbmm", "aten.addmv")
def addmm(call: Call, bias: Labels, x: Labels, y: Labels, **_: Argument) -> Labels:
    """Matrix product plus something that broadcasts."""
    return combine(call.structure, bias, matmul(call, x, y))


@rule("aten._grouped_mm", "transformers.grouped_mm_fallback")
def grouped(
    call: Call, x: Labels, weight: Labels, offsets: Labels | None = None, *_: Argument, **__: Argument
) -> Result:
    """Runs of rows against one matrix each, of a stack in the order of the runs (experts sorted by number)."""
    if offsets is None or (x.ndim, weight.ndim) != (2, 3):
        return unknown(call, x, weight, offsets)
    produces(call, weight, 2)
    stack = reduce(call.structure, in_order(call.structure, weight, [0], "experts run in their order"), [0])
    return einsum(call.structure, ["sk", "kn"], "sn", [x, stack])


@rule("aten.bilinear")
def bilinear(call: Call, x: Labels, y: Labels, weight: Labels, bias: Labels | None = None) -> Labels:
    """Products of all pairs of two inputs' last dimensions against a weight of shape (out, first, second)."""
    produces(call, weight, 0)
    batch = list(range(x.ndim - 1))
    found = einsum(call.structure, [[*batch, "i"], [*batch, "j"], "oij"], [*batch, "o"], [x, y, weight])
    return found if bias is None else combine(call.structure, found, bias)


@rule("aten.einsum")
def einstein(call: Call, equation: str, operands: Sequence[Labels], **_: Argument) -> Labels:
    """Sum of products in Einstein's notation."""
    terms, output = einsum_terms(equation, operands)
    pairs = [_diagonals(call, term, x) for term, x in zip(terms, operands, strict=True)]
    return einsum(call.structure, [term for term, _ in pairs], output, [x for _, x in pairs])


def einsum_terms(equation: str, operands: Sequence[Labels]) -> tuple[list[list[str]], list[str]]:
    """An index for every dimension of the operands, and those of the result."""
    left, _arrow, right = equation.replace(" ", "").partition("->")
    terms = [_letters(term, x.ndim) for term, x in zip(left.split(","), operands, strict=True)]
    if not _arrow:
        flat = [letter for term in terms for letter in term]
        dots = list(dict.fromkeys(letter for letter in flat if letter.startswith(".")))
        output = [*dots, *sorted(x for x in flat if flat.count(x) == 1 and not x.startswith("."))]
    else:
        longest = max((sum(x.startswith(".") for x in term) for term in terms), default=0)
        output = _letters(right, longest + len(right.replace("...", "")))
    return terms, output


def _diagonals(call: Call, term: list[str], x: Labels) -> tuple[list[str], Labels]:
    """A repeated index takes a diagonal."""
    for letter in dict.fromkeys(term):
        while term.count(letter) > 1:
            first = term.index(letter)
            second = term.index(letter, first + 1)
            x = diagonal(call.structure, x, first, second)
            term = [*(other for dim, other in enumerate(term) if dim not in (first, second)), letter]
    return term, x


def _letters(term: str, ndim: int) -> list[str]:
    head, dots, tail = term.partition("...")
    hidden = ndim - len(head) - len(tail) if dots else 0
    return [*head, *(f".{hidden - index}" for index in range(hidden)), *tail]


# ---------------------------------------------------------------------------------------------------- convolution


@rule("aten.conv1d", "aten.conv2d", "aten.conv3d")
def convolution(call: Call, x: Labels, weight: Labels, bias: Labels | None = None, *args: Argument) -> Labels:
    """Channels against axis 1 of the weight, block by block when there are groups."""
    produces(call, weight, 0)
    return _convolve(call, x, weight, bias, args[3] if len(args) > 3 else 1, "oc")


@rule("aten.conv_transpose1d", "aten.conv_transpose2d", "aten.conv_transpose3d")
def transposed(call: Call, x: Labels, weight: Labels, bias: Labels | None = None, *args: Argument) -> Labels:
    """Channels against axis 0 of the weight, block by block when there are groups."""
    produces(call, weight, 1)
    return _convolve(call, x, weight, bias, args[3] if len(args) > 3 else 1, "co")


@rule("aten.convolution")
def general(call: Call, x: Labels, weight: Labels, bias: Labels | None, *args: Argument) -> Result:
    """Convolution or its transpose; `args`: stride, padding, dilation, transposed, output padding, groups."""
    turn: Rule = transposed if args[3] else convolution
    return turn(call, x, weight, bias, *args[:3], args[5])


def _convolve(call: Call, x: Labels, weight: Labels, bias: Labels | None, groups: int, axes: str) -> Labels:
    structure, pixels = call.structure, weight.ndim - 2
    x = x if x.ndim == weight.ndim else insert(x, [0])
    flat = _without(in_order(structure, x, range(2, x.ndim), "position in an image"), pixels)
    batch, channels = flat.shape
    blocks = reshape(structure, flat, (batch, groups, channels // groups))
    kernel = _kernel(call, weight, groups)
    found = einsum(structure, ["ngc", ["g", *axes]], "ngo", [blocks, kernel])
    found = reshape(structure, found, (batch, found.shape[1] * found.shape[2]))
    if bias is not None:
        found = combine(structure, found, bias)
    found = found if len(call.shape) == weight.ndim else drop(found, [0])
    spatial = range(len(call.shape) - pixels, len(call.shape))
    found = insert(found, spatial)
    return Labels(call.shape, found.factors, found.fixed | {dim for dim in spatial if call.shape[dim] > 1})


def _without(x: Labels, pixels: int) -> Labels:
    """Drop the last dimensions, on which no factor may depend."""
    kept = x.ndim - pixels
    factors = tuple(factor.reshape(factor.shape[:kept]) for factor in x.factors)
    return Labels(x.shape[:kept], factors, frozenset(dim for dim in x.fixed if dim < kept))


def _kernel(call: Call, weight: Labels, groups: int) -> Labels:
    """Weight of a convolution as (blocks, axis 0 of a block, axis 1 of a block); its pixels are pinned."""
    structure = call.structure
    pixels = range(2, weight.ndim)
    flat = _without(in_order(structure, weight, pixels, "position in a convolution kernel"), len(pixels))
    height, width = flat.shape
    columns = structure.virtual(weight.source, groups, width) if weight.source and groups > 1 else None
    if columns is None:
        return reshape(structure, flat, (groups, height // groups, width))
    rows = structure.axis(weight.source, 0, height).reshape(groups, height // groups, 1)
    shape = (groups, height // groups, width)
    return combine(
        structure,
        Labels(shape, maximal(structure, [rows])),
        Labels(shape, maximal(structure, [columns.reshape(groups, 1, width)])),
    )


# ------------------------------------------------------------------------------------------------------ attention


@rule("aten.scaled_dot_product_attention")
def attention(
    call: Call,
    query: Labels,
    key: Labels,
    value: Labels,
    mask: Labels | None = None,
    *args: Argument,
    **kwargs: Argument,
) -> Labels:
    """Queries (…, T, d) against keys (…, S, d), softmax over S, then against values (…, S, e)."""
    structure = call.structure
    if kwargs.get("enable_gqa") and query.shape[-3] != key.shape[-3]:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = (copies(structure, x, x.ndim - 3, repeats) for x in (key, value))
    batch = list(range(query.ndim - 2))
    scores = einsum(structure, [[*batch, "t", "d"], [*batch, "s", "d"]], [*batch, "t", "s"], [query, key])
    if mask is not None:
        scores = combine(structure, scores, mask)
    scores = normalise(structure, scores, [-1])
    return einsum(structure, [[*batch, "t", "s"], [*batch, "s", "e"]], [*batch, "t", "e"], [scores, value])
