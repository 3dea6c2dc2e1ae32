"""Sizes, inputs, work and benchmark shapes of the bit ops."""

from math import prod

from ...core.case import Array, Case, Dim, Integers, OneOf

_SIZES = dict(B=Dim(0, 3), C=Dim(0, 4), h=Dim(0, 50), w=Dim(0, 50), form=OneOf("image", "row", "volume"), order=OneOf("lsb", "msb"))
_WIDTHS = OneOf((8, "uint8"), (1, "uint8"), (4, "int32"), (8, "int64"), (16, "int32"), (31, "int64"))
_SHAPES = {"1x3x64x64": (1, 3, 64, 64), "32x3x64x64": (32, 3, 64, 64), "8x3x256x256": (8, 3, 256, 256)}
_BENCH = {f"{name} x {bits} of {dtype}": dict(zip("BChw", shape, strict=True)) | dict(width=(bits, dtype))
          for name, shape in _SHAPES.items() for bits, dtype in ((8, "uint8"),)} | {
    "8x2x512x512 x 8 of int32": dict(B=8, C=2, h=512, w=512, width=(8, "int32"))}


def _space(h, w, form):
    return {"image": (h, w), "row": (w,), "volume": (2, h, w)}[form]


def _to_bits(B, C, h, w, form, order, width, scale):
    bits, kind = width
    x = Integers((B, C, *_space(h, w, form)), 0, 2**bits - 1, dtype=kind, widths=("uint8", "int32", "int64"))
    return dict(x=x, bits=bits, scale=scale, order=order)


def _from_bits(B, C, h, w, form, order, width):
    return dict(x=Array((B, C * width[0], *_space(h, w, form)), grad=False), bits=width[0], order=order)


_BYTES = {"uint8": 1, "int32": 4, "int64": 8}
CASES = {
    "to_bits": Case(dims=_SIZES | dict(width=_WIDTHS, scale=OneOf(1.0, 0.5)), arguments=_to_bits, batched=("x",), bench=_BENCH,
                    bytes=lambda size, x, bits, **_: prod(x.shape) * (_BYTES[x.dtype] + 4 * bits)),
    "from_bits": Case(dims=_SIZES | dict(width=_WIDTHS), arguments=_from_bits, batched=("x",), bench=_BENCH,
                      bytes=lambda size, x, bits, **_: prod(x.shape) * size + prod(x.shape) // bits * (1 if bits <= 8 else 4))}
