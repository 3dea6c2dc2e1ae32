"""Sizes, inputs, work and benchmark shapes of cross_attend."""

from math import prod

import torch
import torch.nn.functional as F

from ...core.case import Array, Case, Dim, Integers, OneOf


def _arguments(B, M, N, D, C, O, heads, width, value_width, norm, bias, lengths, residual):
    A, V, O = heads * width, heads * (value_width or width), D if residual else O
    weight = lambda rows, columns: Array((rows, columns), scale=columns**-0.5)
    vector = lambda n, wanted=bias: Array((n,)) if wanted else None
    return dict(
        target=Array((B, M, D)), source=Array((B, N, C)), q_weight=weight(A, D), k_weight=weight(A, C), v_weight=weight(V, C),
        out_weight=weight(O, V), heads=heads, q_bias=vector(A), k_bias=vector(A), v_bias=vector(V), out_bias=vector(O), eps=1e-5,
        residual=residual, key_lengths=Integers((B,), 0, N) if lengths else None,
        **{f"{name}_norm_{i}": vector(n, norm) for name, n in (("target", D), ("source", C)) for i in range(2)})


def _flops(target, source, q_weight, k_weight, v_weight, out_weight, heads, **_):
    """Of the source's projections and attention, or, with one head, of attention to the source itself where that is less."""
    B, M, (N, C), width = *target.shape[:2], source.shape[1:], q_weight.shape[0] + v_weight.shape[0]
    inner = N * C * width + M * N * width
    if heads == 1:
        inner = min(inner, M * C * width + 2 * M * N * C)
    return 2 * B * (M * (prod(q_weight.shape) + prod(out_weight.shape)) + inner)


def _bytes(size, target, source, q_weight, k_weight, v_weight, out_weight, **_):
    return size * (2 * prod(target.shape) + sum(prod(x.shape) for x in (source, q_weight, k_weight, v_weight, out_weight)))


def _row(M, N, D, C, heads, width, **options):
    return dict(B=1, M=M, N=N, D=D, C=C, heads=heads, width=width, bias=True, **options)


def _fused(target, source, q_weight, k_weight, v_weight, out_weight, *, heads, q_bias, k_bias, v_bias, out_bias, target_norm, source_norm,
           eps, residual, key_lengths):
    """The layer around PyTorch's own attention."""
    z = target if target_norm is None else F.layer_norm(target, target.shape[-1:], *target_norm, eps)
    x = source if source_norm is None else F.layer_norm(source, source.shape[-1:], *source_norm, eps)
    split = lambda x: x.unflatten(-1, (heads, -1)).transpose(1, 2)
    mask = None
    if key_lengths is not None:
        mask = (torch.arange(source.shape[1], device=source.device) < key_lengths.view(-1, 1))[:, None, None]
    q, k, v = split(F.linear(z, q_weight, q_bias)), split(F.linear(x, k_weight, k_bias)), split(F.linear(x, v_weight, v_bias))
    y = F.linear(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2), out_weight, out_bias)
    return target + y if residual else y


CASES = {"cross_attend": Case(
    dims=dict(B=Dim(0, 2), M=Dim(0, 70), N=Dim(0, 70), D=Dim(1, 24), C=Dim(1, 24), O=Dim(1, 24), heads=OneOf(1, 2), width=Dim(1, 12),
              value_width=OneOf(None), norm=OneOf(False, True), bias=OneOf(False, True), lengths=OneOf(False, True),
              residual=OneOf(True, False)),
    arguments=_arguments, flops=_flops, bytes=_bytes, batched=("target", "source", "key_lengths"),
    gather=("target_norm", "source_norm"), backward_flops=2.5, fused=_fused,
    bench={"RIN CIFAR read": _row(128, 256, 512, 256, 8, 32), "RIN CIFAR write": _row(256, 128, 256, 512, 8, 32, norm=True),
           "RIN-256 read": _row(256, 1024, 768, 512, 16, 32), "RIN-256 write": _row(1024, 256, 512, 768, 16, 32, norm=True),
           "RIN-1024 read": _row(256, 16384, 768, 512, 16, 32), "RIN-1024 write": _row(16384, 256, 512, 768, 16, 32, norm=True),
           "RIN video read": _row(256, 2048, 1024, 512, 16, 32), "RIN video write": _row(2048, 256, 512, 1024, 16, 32, norm=True),
           "Perceiver ImageNet, one head": _row(512, 50176, 1024, 261, 1, 261, norm=True),
           "Perceiver IO text": _row(256, 2048, 1280, 768, 8, 32, norm=True, value_width=160)})}
