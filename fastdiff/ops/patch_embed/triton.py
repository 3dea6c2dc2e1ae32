"""Products with one side in an image: tiles of patches are gathered from it, or scattered to it, pixel by pixel."""

from math import prod

from ...core import device
from ...core.backend import triton
from ...core.jit import OPTIONS, cdiv, dot, jit, narrow, tl
from ...core.launch import pick

# By element size; the size is a patch's. Chosen so that no kernel spills registers, not timed on a GPU yet.
LAUNCH = {
    "patch_embed": {
        2: ((0, 16, dict(BLOCK_M=64, BLOCK_D=128, BLOCK_K=16, num_warps=4, num_stages=1)),
            (0, None, dict(BLOCK_M=64, BLOCK_D=128, BLOCK_K=32, num_warps=8, num_stages=3))),
        4: ((0, 16, dict(BLOCK_M=64, BLOCK_D=64, BLOCK_K=16, num_warps=8, num_stages=1)),
            (0, None, dict(BLOCK_M=64, BLOCK_D=32, BLOCK_K=32, num_warps=8, num_stages=2)))},
    "unpatch_project": {
        2: ((0, 16, dict(BLOCK_M=64, BLOCK_D=64, BLOCK_K=16, num_warps=4, num_stages=3)),
            (0, None, dict(BLOCK_M=64, BLOCK_D=64, BLOCK_K=64, num_warps=8, num_stages=3))),
        4: ((0, 16, dict(BLOCK_M=64, BLOCK_D=32, BLOCK_K=16, num_warps=4, num_stages=2)),
            (0, None, dict(BLOCK_M=64, BLOCK_D=32, BLOCK_K=32, num_warps=8, num_stages=2)))},
}


@jit
def _corner(o_m, G0, G1, G2, strides, P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr):
    """Where in the image the patch of each token (b g0 g1 g2) begins."""
    g2, rest = o_m % G2, o_m // G2
    g1, rest = rest % G1, rest // G1
    g0, b = rest % G0, rest // G0
    return (b.to(tl.int64) * strides[0] + (g0 * P0).to(tl.int64) * strides[2] + (g1 * P1).to(tl.int64) * strides[3]
            + (g2 * P2).to(tl.int64) * strides[4])


@jit
def _pixel(o_k, strides, P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr):
    """How far from its patch's beginning each element (c p0 p1 p2) lies in the image."""
    p2, rest = o_k % P2, o_k // P2
    p1, rest = rest % P1, rest // P1
    p0, c = rest % P0, rest // P0
    return (c.to(tl.int64) * strides[1] + p0.to(tl.int64) * strides[2] + p1.to(tl.int64) * strides[3] + p2.to(tl.int64) * strides[4])


@jit
def _embed(x_ptr, weight_ptr, bias_ptr, position_ptr, y_ptr, M, D, G0, G1, G2, x_strides, weight_strides, K: tl.constexpr,
           P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr):
    """A tile of y = patches weight^T + bias + position.

    grid    cdiv(M, BLOCK_M) cdiv(D, BLOCK_D), columns innermost: neighbours read the same patches
    layout  x (B, C, G0 P0, G1 P1, G2 P2), weight (D, K = C P0 P1 P2), any strides; bias (D,), position (G0 G1 G2, D), y (M, D) contiguous,
            M = B G0 G1 G2; bias and position may be None
    math    fp32, from the first block of K to the last, rounded once
    needs   M < 2^31; blocks that are powers of two of at least 16
    """
    blocks = tl.cdiv(D, BLOCK_D)
    pid = tl.program_id(0).to(tl.int64)
    o_m, o_d = (pid // blocks * BLOCK_M).to(tl.int32) + tl.arange(0, BLOCK_M), pid % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    m_m, m_d = (o_m < M)[:, None], (o_d < D)[None, :]
    x_ptr += _corner(o_m, G0, G1, G2, x_strides, P0, P1, P2)[:, None]
    weight_ptr += o_d[None, :] * weight_strides[0]
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for i_k in range(0, K, BLOCK_K):
        o_k = i_k + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + _pixel(o_k, x_strides, P0, P1, P2)[None, :], mask=m_m & (o_k < K)[None, :], other=0.0)
        weight = tl.load(weight_ptr + o_k.to(tl.int64)[:, None] * weight_strides[1], mask=m_d & (o_k < K)[:, None], other=0.0)
        acc = dot(x, weight, acc)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + o_d, mask=o_d < D, other=0.0).to(tl.float32)[None, :]
    if position_ptr is not None:
        o_n = (o_m % (G0 * G1 * G2)).to(tl.int64)[:, None]
        acc += tl.load(position_ptr + o_n * D + o_d[None, :], mask=m_m & m_d, other=0.0).to(tl.float32)
    tl.store(y_ptr + o_m.to(tl.int64)[:, None] * D + o_d[None, :], narrow(acc, y_ptr.dtype.element_ty), mask=m_m & m_d)


@jit
def _project(x_ptr, weight_ptr, bias_ptr, y_ptr, M, D, G0, G1, G2, x_strides, weight_strides, y_strides, K: tl.constexpr,
             P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr):
    """A tile of x weight^T + bias, at its pixels of the image y.

    grid    cdiv(M, BLOCK_M) cdiv(K, BLOCK_K), columns innermost: neighbours read the same tokens
    layout  x (B, G0 G1 G2, D), weight (K = C P0 P1 P2, D), y (B, C, G0 P0, G1 P1, G2 P2), any strides; bias (K,) contiguous or None
    math    fp32, from the first block of D to the last, rounded once
    needs   M = B G0 G1 G2 < 2^31; blocks that are powers of two of at least 16
    """
    blocks = tl.cdiv(K, BLOCK_K)
    pid = tl.program_id(0).to(tl.int64)
    o_m, o_k = (pid // blocks * BLOCK_M).to(tl.int32) + tl.arange(0, BLOCK_M), (pid % blocks * BLOCK_K).to(tl.int32) + tl.arange(0, BLOCK_K)
    m_m, m_k = (o_m < M)[:, None], (o_k < K)[None, :]
    tokens = G0 * G1 * G2
    x_ptr += ((o_m // tokens).to(tl.int64) * x_strides[0] + (o_m % tokens).to(tl.int64) * x_strides[1])[:, None]
    weight_ptr += o_k.to(tl.int64)[None, :] * weight_strides[0]
    acc = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for i_d in range(0, D, BLOCK_D):
        o_d = i_d + tl.arange(0, BLOCK_D).to(tl.int64)
        x = tl.load(x_ptr + o_d[None, :] * x_strides[2], mask=m_m & (o_d < D)[None, :], other=0.0)
        weight = tl.load(weight_ptr + o_d[:, None] * weight_strides[1], mask=m_k & (o_d < D)[:, None], other=0.0)
        acc = dot(x, weight, acc)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + o_k, mask=o_k < K, other=0.0).to(tl.float32)[None, :]
    y_ptr += _corner(o_m, G0, G1, G2, y_strides, P0, P1, P2)[:, None] + _pixel(o_k, y_strides, P0, P1, P2)[None, :]
    tl.store(y_ptr, narrow(acc, y_ptr.dtype.element_ty), mask=m_m & m_k)


def _space(image, grid, patch):
    """(grid, strides, patch) of an image whose space is padded in front to three axes with axes of size 1."""
    pad = (1,) * (3 - len(patch))
    return (*pad, *grid), (*image.stride()[:2], *(0,) * len(pad), *image.stride()[2:]), (*pad, *patch)


def _chosen(name, x, K):
    return pick(LAUNCH[name][x.element_size()], device.architecture(x.device), K)


def _run_embed(args, outs):
    x, weight, bias, position, patch = args
    (y,) = outs
    (B, N, D), K = y.shape, weight.shape[1]
    chosen = _chosen("patch_embed", x, K)
    if y.numel():
        grid, strides, patch = _space(x, [size // p for size, p in zip(x.shape[2:], patch, strict=True)], patch)
        bias, position = (None if a is None else a.contiguous() for a in (bias, position))
        _embed[(cdiv(B * N, chosen["BLOCK_M"]) * cdiv(D, chosen["BLOCK_D"]),)](
            x, weight, bias, position, y, B * N, D, *grid, strides, weight.stride(), K, *patch, **chosen, **OPTIONS)


def _run_project(args, outs):
    tokens, weight, bias, patch, grid = args
    (y,) = outs
    (B, N, D), K = tokens.shape, weight.shape[0]
    chosen = _chosen("unpatch_project", tokens, K)
    if y.numel():
        grid, strides, patch = _space(y, grid, patch)
        _project[(cdiv(B * N, chosen["BLOCK_M"]) * cdiv(K, chosen["BLOCK_K"]),)](
            tokens, weight, None if bias is None else bias.contiguous(), y, B * N, D, *grid, tokens.stride(), weight.stride(), strides, K,
            *patch, **chosen, **OPTIONS)


def _refuse(tokens):
    return None if tokens < 2**31 else f"takes fewer than 2^31 tokens, got {tokens}"


PATCH_EMBED = triton(_run_embed, refuse=lambda x, *args: _refuse(x.shape[0] * prod(x.shape[2:]) // prod(args[3])),
                     plan=lambda *_: "a product whose tiles of patches are gathered from the image")
UNPATCH_PROJECT = triton(_run_project, refuse=lambda tokens, *_: _refuse(prod(tokens.shape[:2])),
                         plan=lambda *_: "a product whose tiles are scattered to the image")
