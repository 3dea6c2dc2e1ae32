"""Sizes, inputs, work and benchmark shapes of linear."""

from math import prod

from ...core.case import Array, Case, Dim, OneOf


def _arguments(M, N, K, biased):
    return dict(x=Array((M, K)), weight=Array((N, K)), bias=Array((N,)) if biased else None)


_BENCH = {
    "RIN keys 16384x512x512": dict(M=16384, N=512, K=512),
    "latent queries 256x768x512": dict(M=256, N=512, K=768),
    "Perceiver latents 512x1024x261": dict(M=512, N=261, K=1024),
}

CASES = {"linear": Case(
    dims=dict(M=Dim(0, 300), N=Dim(1, 300), K=Dim(0, 300), biased=OneOf(False, True)), arguments=_arguments,
    flops=lambda x, weight, **_: 2 * prod(x.shape) * weight.shape[0],
    bytes=lambda size, x, weight, **_: size * (prod(x.shape) + prod(weight.shape) + prod(x.shape[:-1]) * weight.shape[0]),
    batched=("x",), any_rank=("x",), bench=_BENCH)}
