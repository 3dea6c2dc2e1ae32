"""Sizes, inputs, work and benchmark shapes of merge_attention."""

from math import prod

from ...core.case import Array, Case, Dim

_BENCH = {
    "latents B8 H16 M256 E64": dict(B=8, H=16, M=256, E=64),
    "Perceiver H1 M512 E261": dict(B=1, H=1, M=512, E=261),
    "interface H16 M16384 E32": dict(B=1, H=16, M=16384, E=32),
}


def _arguments(B, H, M, E):
    out, lse = Array((B, H, M, E)), Array((B, H, M), masks=True, dtype="float32")
    return dict(out_a=out, lse_a=lse, out_b=out, lse_b=lse)


CASES = {"merge_attention": Case(
    dims=dict(B=Dim(0, 3), H=Dim(1, 3), M=Dim(0, 130), E=Dim(1, 80)), arguments=_arguments,
    flops=lambda out_a, **_: 3 * prod(out_a.shape),
    bytes=lambda size, out_a, lse_a, **_: 3 * (size * prod(out_a.shape) + 4 * prod(lse_a.shape)),
    batched=("out_a", "lse_a", "out_b", "lse_b"), bench=_BENCH)}
