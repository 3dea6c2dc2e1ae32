"""Sizes, inputs, work and benchmark shapes of attention."""

from dataclasses import replace
from math import prod

import torch.nn.functional as F

from ...core.case import Array, Case, Dim, Integers, OneOf
from . import reference

_BIAS = {"full": "BHMN", "heads": "HMN", "shared": "MN", "keys": "BN", "one head": "BMN"}


def _bias(kind, B, H, M, N):
    axes = _BIAS[kind]
    return Array(tuple(size if axis in axes else 1 for axis, size in zip("BHMN", (B, H, M, N), strict=True)), masks=True)


def _arguments(B, H, M, N, E, bias, lengths, causal, scale):
    return dict(q=Array((B, H, M, E)), k=Array((B, H, N, E)), v=Array((B, H, N, E)), bias=_bias(bias, B, H, M, N) if bias else None,
                key_lengths=Integers((B,), 0, N) if lengths else None, causal=causal, scale=scale)


def _seen(M, N, causal):
    """Query-key pairs that a mask known beforehand leaves."""
    return sum(min(max(m + 1 + N - M, 0), N) for m in range(M)) if causal else M * N


def _flops(q, k, causal, **_):
    B, H, M, E = q.shape
    return 4 * B * H * E * _seen(M, k.shape[2], causal)


def _bytes(size, q, k, bias=None, **_):
    return size * (2 * prod(q.shape) + 2 * prod(k.shape) + (prod(bias.shape) if bias is not None else 0))


def _row(B, H, M, N, E, **options):
    return dict(B=B, H=H, M=M, N=N, E=E, **options)


_BENCH = {
    "RIN read H16 M256 N4096 E32": _row(1, 16, 256, 4096, 32),
    "RIN write H16 M4096 N256 E32": _row(1, 16, 4096, 256, 32),
    "RIN-1024 read H16 M256 N16384 E32": _row(1, 16, 256, 16384, 32),
    "RIN-1024 write H16 M16384 N256 E32": _row(1, 16, 16384, 256, 32),
    "latent read B8 H16 M128 N256 E64": _row(8, 16, 128, 256, 64),
    "Perceiver H1 M512 N50176 E261": _row(1, 1, 512, 50176, 261),
    "Perceiver H8 M512 N50176 E64": _row(1, 8, 512, 50176, 64),
    "Perceiver latents H8 M512 N512 E128": _row(1, 8, 512, 512, 128),
    "LDM text B2 H8 M4096 N77 E40": _row(2, 8, 4096, 77, 40),
    "DiT-XL H16 M1024 N1024 E72": _row(1, 16, 1024, 1024, 72),
    "Perceiver AR H16 M1024 N8192 E64 causal": _row(1, 16, 1024, 8192, 64, causal=True),
}

def _sdpa(q, k, v, bias, key_lengths, causal, scale):
    mask = None
    if bias is not None or key_lengths is not None or causal:
        mask = reference.scores(q.detach()[..., :0], k.detach()[..., :0], bias, key_lengths, causal, scale)  # 0, bias, -inf
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def _sdpa_with_lse(q, k, v, bias, key_lengths, causal, scale):
    return (_sdpa(q, k, v, bias, key_lengths, causal, scale), reference.logsumexp(reference.scores(q, k, bias, key_lengths, causal, scale)))


_CASE = Case(
    dims=dict(B=Dim(0, 3), H=Dim(1, 3), M=Dim(0, 160), N=Dim(0, 300), E=Dim(1, 80), bias=OneOf(None, *_BIAS), lengths=OneOf(False, True),
              causal=OneOf(False, True), scale=OneOf(None, 0.37)),
    arguments=_arguments, flops=_flops, bytes=_bytes, batched=("q", "k", "v", "key_lengths"), heads=("q", "k", "v"),
    backward_flops=2.5, bench=_BENCH, fused=_sdpa)

CASES = {"attention": _CASE, "attention_with_lse": replace(_CASE, fused=_sdpa_with_lse)}
