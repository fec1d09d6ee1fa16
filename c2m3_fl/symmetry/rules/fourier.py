"""Rules of Fourier transforms, which mix the entries along a dimension in their order, and of complex numbers."""

from __future__ import annotations

from c2m3_fl.symmetry.labels import Labels
from c2m3_fl.symmetry.rules.registry import Argument, Call, rule
from c2m3_fl.symmetry.unit_labels import combine, drop, in_order, insert

_KINDS = ("", "i", "r", "ir", "h", "ih")
_ONE = [f"aten.fft_{kind}fft" for kind in _KINDS]
_SEVERAL = [f"aten.fft_{kind}fft{count}" for kind in _KINDS[:4] for count in "2n"]
_PLAIN = ["aten._fft_r2c", "aten._fft_c2c", "aten._fft_c2r"]


@rule(*_ONE, *_SEVERAL, *_PLAIN, "aten.fft_fftshift", "aten.fft_ifftshift")
def transform(call: Call, x: Labels, *args: Argument, **options: Argument) -> Labels:
    """Dimensions that are transformed keep their order; the others are treated alike."""
    name = call.structure.operator.split(".")[1]
    place = 0 if name.startswith("_") or name.endswith("shift") else 1
    dims = options.get("dim", args[place] if len(args) > place else None)
    if dims is None:
        sizes = options.get("s", args[0] if args and not isinstance(args[0], int) else None)
        all_of_them = range(x.ndim - len(sizes), x.ndim) if sizes else range(x.ndim)
        dims = {"t": [-1], "2": [-2, -1]}.get(name[-1], all_of_them) if not name.endswith("shift") else all_of_them
    dims = [x.dim(dim) for dim in ([dims] if isinstance(dims, int) else dims)]
    found = in_order(call.structure, x, dims, "mixed by a Fourier transform")
    return Labels(call.shape, found.factors, found.fixed | {dim for dim in dims if call.shape[dim] > 1})


@rule("aten.real", "aten.imag", "aten.conj", "aten.resolve_conj", "aten.resolve_neg", "aten.angle", "aten.complex")
@rule("aten.polar", "aten.conj_physical", "aten._conj_copy")
def entry_by_entry(call: Call, *parts: Labels) -> Labels:
    """Complex numbers and their parts, entry by entry."""
    return combine(call.structure, *parts)


@rule("aten.view_as_complex", "aten.view_as_complex_copy")
def view_as_complex(call: Call, x: Labels) -> Labels:
    """The last dimension holds real and imaginary part, in this order."""
    x = in_order(call.structure, x, [-1], "real and imaginary part")
    return drop(Labels((*x.shape[:-1], 1), x.factors, x.fixed - {x.ndim - 1}), [x.ndim - 1])


@rule("aten.view_as_real", "aten.view_as_real_copy")
def view_as_real(call: Call, x: Labels) -> Labels:
    """A new last dimension of real and imaginary part."""
    x = insert(x, [x.ndim])
    return Labels(call.shape, x.factors, x.fixed | {x.ndim - 1})
