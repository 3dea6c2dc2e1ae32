"""Sizes, inputs, work and benchmark shapes of geglu."""

from math import prod

from ...core.case import Array, Case, Dim, OneOf


def _arguments(B, N, F, approximate):
    return dict(x=Array((B, N, 2 * F)), approximate=approximate)


CASES = {"geglu": Case(
    dims=dict(B=Dim(0, 3), N=Dim(0, 130), F=Dim(0, 150), approximate=OneOf("none", "tanh")), arguments=_arguments,
    bytes=lambda size, x, **_: 3 * size * prod(x.shape) // 2, batched=("x",), any_rank=("x",),
    bench={"LDM 64x64 B2": dict(B=2, N=4096, F=1280), "LDM 64x64": dict(B=1, N=4096, F=1280), "LDM 32x32 B2": dict(B=2, N=1024, F=2560),
           "LDM 16x16 B2": dict(B=2, N=256, F=5120)})}
