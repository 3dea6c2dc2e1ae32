"""Sizes, inputs, work and benchmark shapes of patch_embed and unpatch_project."""

from math import prod

from ...core.case import Array, Case, Dim, OneOf

_SIZES = dict(B=Dim(0, 3), C=Dim(0, 5), D=Dim(0, 300), patch=OneOf((2, 2), (1, 3), (5, 4), (16, 1), (8, 8)), order=OneOf("pqc", "cpq"),
              grid=OneOf((3, 5), (1, 1), (0, 2), (4, 33), (7,), (2, 3, 4)), biased=OneOf(True, False))


def _patch(patch, grid):
    """As many of the patch's sizes as the grid has axes."""
    return (patch * 2)[:len(grid)]


def _embed(B, C, D, patch, order, grid, biased, placed):
    patch = _patch(patch, grid)
    return dict(x=Array((B, C, *(g * p for g, p in zip(grid, patch, strict=True)))),
                weight=Array((D, prod(patch) * C), scale=max(1, prod(patch) * C) ** -0.5), bias=Array((D,)) if biased else None,
                position=Array((prod(grid), D)) if placed else None, patch=patch, order=order)


def _project(B, C, D, patch, order, grid, biased):
    patch = _patch(patch, grid)
    return dict(tokens=Array((B, prod(grid), D)), weight=Array((prod(patch) * C, D), scale=max(1, D) ** -0.5),
                bias=Array((prod(patch) * C,)) if biased else None, patch=patch, grid=grid, order=order)


def _embed_bytes(size, x, weight, position, patch, **_):
    tokens = prod(x.shape) // max(1, weight.shape[1])
    return size * (prod(x.shape) + prod(weight.shape) + tokens * weight.shape[0] + (prod(position.shape) if position else 0))


def _project_bytes(size, tokens, weight, **_):
    return size * (prod(tokens.shape) + prod(weight.shape) + prod(tokens.shape[:2]) * weight.shape[0])


_BENCH = {
    "DiT-XL/2 8x4x32x32 p2 D1152": dict(B=8, C=4, D=1152, grid=(16, 16), patch=(2, 2)),
    "R-256 1x3x256x256 p8 D512": dict(B=1, C=3, D=512, grid=(32, 32), patch=(8, 8)),
    "R-1024 1x3x1024x1024 p8 D512": dict(B=1, C=3, D=512, grid=(128, 128), patch=(8, 8)),
    "ViT-B/16 8x3x224x224 p16 D768": dict(B=8, C=3, D=768, grid=(14, 14), patch=(16, 16), order="cpq"),
    "video 1x3x16x64x64 p2,4,4 D512": dict(B=1, C=3, D=512, grid=(8, 16, 16), patch=(2, 4, 4)),
}

CASES = {
    "patch_embed": Case(
        dims=_SIZES | dict(placed=OneOf(True, False)), arguments=_embed, batched=("x",), bench=_BENCH, bytes=_embed_bytes,
        flops=lambda x, weight, **_: 2 * prod(x.shape) * weight.shape[0]),
    "unpatch_project": Case(
        dims=_SIZES, arguments=_project, batched=("tokens",), bench=_BENCH, bytes=_project_bytes,
        flops=lambda tokens, weight, **_: 2 * prod(tokens.shape) * weight.shape[0])}
