"""Sizes, inputs, work and benchmark shapes of fourier_cross_attend."""

from math import prod

from ...core.case import Array, Case, Dim, OneOf
from . import reference


def _arguments(B, M, C, D, O, heads, width, grid, bands, order, norm, bias, residual):
    A, wide, O = heads * width, C + len(grid) * (2 * bands + 1), D if residual else O
    weight = lambda rows, columns: Array((rows, columns), scale=columns**-0.5)
    vector = lambda n, wanted=bias: Array((n,)) if wanted else None
    return dict(
        latents=Array((B, M, D)), image=Array((B, C, *grid)), q_weight=weight(A, D), k_weight=weight(A, wide), v_weight=weight(A, wide),
        out_weight=weight(O, A), bands=bands, max_freq=float(max(grid)), order=order, heads=heads, q_bias=vector(A),
        k_bias=vector(A), v_bias=vector(A), out_bias=vector(O), eps=1e-5, residual=residual,
        **{f"{name}_norm_{i}": vector(n, norm) for name, n in (("target", D), ("source", wide)) for i in range(2)})


def _scores(latents, image, heads):
    return latents.shape[0] * heads * latents.shape[1] * prod(image.shape[2:])


def _flops(latents, image, heads, **_):
    """Of a score: C + 1 planes in, C + 2 sums out, two flops each, and about 14 of an exponential."""
    return _scores(latents, image, heads) * (4 * image.shape[1] + 20)


def _bytes(size, latents, image, q_weight, k_weight, v_weight, out_weight, **_):
    return size * (2 * prod(latents.shape) + sum(prod(x.shape) for x in (image, q_weight, k_weight, v_weight, out_weight)))


def _row(B, M, C, D, heads, width, grid, bands, **options):
    return dict(B=B, M=M, C=C, D=D, heads=heads, width=width, grid=grid, bands=bands, norm=True, bias=True, **options)


CASES = {"fourier_cross_attend": Case(
    dims=dict(B=Dim(0, 2), M=Dim(0, 20), C=Dim(1, 5), D=Dim(1, 24), O=Dim(1, 24), heads=OneOf(1, 2), width=Dim(1, 12),
              grid=OneOf((4, 5), (3, 18), (1, 1), (17, 33), (2, 3, 4), (3, 2, 17), (0, 4)), bands=Dim(1, 6), order=OneOf("kind", "axis"),
              norm=OneOf(False, True), bias=OneOf(False, True), residual=OneOf(True, False)),
    arguments=_arguments, flops=_flops, bytes=_bytes, batched=("latents", "image"), reference=reference.fourier_cross_attend,
    gather=("target_norm", "source_norm"),
    bench={"Perceiver M512 224x224": _row(1, 512, 3, 1024, 1, 261, (224, 224), 64),
           "Perceiver M256 64x64 B4": _row(4, 256, 3, 512, 1, 128, (64, 64), 32),
           "video M256 16x64x64": _row(1, 256, 3, 512, 1, 128, (16, 64, 64), 16)})}
