"""Sizes, inputs, work and benchmark shapes of patchify, space_to_depth and their inverses."""

from math import prod

from ...core.case import Array, Case, Dim, OneOf

_SIZES = dict(B=Dim(0, 3), C=Dim(0, 9), grid=OneOf((3, 5), (1, 1), (0, 2), (4, 33), (7,), (32,), (2, 3, 4), (1, 31, 2)), patch=Dim(1, 8),
              order=OneOf("pqc", "cpq"), square=OneOf(True, False))


def _patch(grid, patch, square):
    return (patch,) * len(grid) if square else tuple(1 + (patch + i) % 4 for i in range(len(grid)))


def _patchify(B, C, grid, patch, order, square):
    patch = patch if isinstance(patch, tuple) else _patch(grid, patch, square)
    return dict(x=Array((B, C, *(g * p for g, p in zip(grid, patch, strict=True)))), patch=patch, order=order)


def _unpatchify(B, C, grid, patch, order, square):
    patch = patch if isinstance(patch, tuple) else _patch(grid, patch, square)
    return dict(tokens=Array((B, prod(grid), prod(patch) * C)), patch=patch, grid=grid, order=order)


def _depth_to_space(B, C, grid, patch, order, square):
    patch = patch if isinstance(patch, tuple) else _patch(grid, patch, square)
    return dict(x=Array((B, prod(patch) * C, *grid)), patch=patch, order=order)


def _bytes(size, x=None, tokens=None, **_):
    return 2 * size * prod((x if tokens is None else tokens).shape)


_BENCH = {
    "8x3x256x256 p8": dict(B=8, C=3, grid=(32, 32), patch=(8, 8)),
    "32x4x64x64 p2": dict(B=32, C=4, grid=(32, 32), patch=(2, 2)),
    "1x3x16x128x128 p2,4,4": dict(B=1, C=3, grid=(8, 32, 32), patch=(2, 4, 4)),
}


def _case(arguments, name):
    return Case(dims=_SIZES, arguments=arguments, flops=lambda **_: 0, bytes=_bytes, batched=(name,), linear=True, backward_flops=1.0,
                bench=_BENCH)


CASES = {"patchify": _case(_patchify, "x"), "unpatchify": _case(_unpatchify, "tokens"), "space_to_depth": _case(_patchify, "x"),
         "depth_to_space": _case(_depth_to_space, "x")}
