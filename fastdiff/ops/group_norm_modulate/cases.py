"""Sizes, inputs, work and benchmark shapes of group_norm_modulate."""

from math import prod

from ...core.case import Array, Case, Dim, OneOf

_SHAPES = {
    "ADM-64 192x64x64 B8": (8, 192, 64, 64), "ADM-64 384x32x32 B8": (8, 384, 32, 32), "ADM-128 256x128x128": (1, 256, 128, 128),
    "ADM-256 256x256x256": (1, 256, 256, 256), "ADM 1024x8x8 B8": (8, 1024, 8, 8), "LDM 320x64x64 B2": (2, 320, 64, 64)}
_BENCH = {name + mark: dict(B=B, groups=32, per_group=C // 32, space=tuple(space), last=bool(mark))
          for mark in ("", " channels last") for name, (B, C, *space) in _SHAPES.items()}


def _arguments(B, groups, per_group, space, parts, modulated, wide, eps, silu, last):
    C, dtype = groups * per_group, "float32" if wide else None
    channels = lambda name: Array((C,), dtype=dtype, either=True) if name in parts.split() else None
    modulation = lambda name: Array((B, C), dtype=dtype, either=True) if name in modulated.split() else None
    return dict(x=Array((B, C, *space), last=last), groups=groups, weight=channels("weight"), bias=channels("bias"),
                scale=modulation("scale"), shift=modulation("shift"), eps=eps, silu=silu)


CASES = {"group_norm_modulate": Case(
    dims=dict(B=Dim(0, 3), groups=Dim(1, 8), per_group=Dim(0, 40), space=OneOf((5, 7), (1, 1), (0, 3), (16, 17), (9,), (130,), (2, 3, 4)),
              parts=OneOf("weight bias", "weight", "bias", ""), modulated=OneOf("scale shift", "scale", "shift", ""),
              wide=OneOf(False, True), eps=OneOf(1e-5, 1e-6, 0.1), silu=OneOf(True, False), last=OneOf(False, True)),
    arguments=_arguments, bytes=lambda size, x, **_: 2 * size * prod(x.shape), batched=("x", "scale", "shift"),
    bench=_BENCH)}
