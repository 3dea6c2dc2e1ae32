"""Patchify and unpatchify: one gather each, over the elements of the result in the order they lie in memory."""

from math import prod

from ...core.backend import triton
from ...core.jit import OPTIONS, cdiv, jit, tl

LAUNCH = dict(BLOCK=1024, num_warps=4)  # not tuned on a GPU yet


@jit
def _patchify(x_ptr, y_ptr, G0, G1, G2, x_strides, C: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
              CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr):
    """y[b, (g0 g1 g2), token element] = x[b, c, g0 P0 + p0, g1 P1 + p1, g2 P2 + p2].

    grid    B cdiv(elements of a sample, BLOCK), blocks innermost
    layout  x (B, C, G0 P0, G1 P1, G2 P2), any strides; y contiguous, its token elements (p0 p1 p2 c) if CHANNELS_LAST, else (c p0 p1 p2)
    math    none: elements are moved
    needs   fewer than 2^31 elements in a sample
    """
    size = G0 * G1 * G2 * (P0 * P1 * P2 * C)
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(size, BLOCK)
    i_b = pid // blocks
    o_y = (pid % blocks * BLOCK).to(tl.int32) + tl.arange(0, BLOCK)
    rest = o_y
    if CHANNELS_LAST:
        c, rest = rest % C, rest // C
    p2, rest = rest % P2, rest // P2
    p1, rest = rest % P1, rest // P1
    p0, rest = rest % P0, rest // P0
    if not CHANNELS_LAST:
        c, rest = rest % C, rest // C
    g2, rest = rest % G2, rest // G2
    g1, g0 = rest % G1, rest // G1
    o_x = (i_b * x_strides[0] + c.to(tl.int64) * x_strides[1] + (g0 * P0 + p0).to(tl.int64) * x_strides[2]
           + (g1 * P1 + p1).to(tl.int64) * x_strides[3] + (g2 * P2 + p2).to(tl.int64) * x_strides[4])
    m_y = o_y < size
    tl.store(y_ptr + i_b * size + o_y, tl.load(x_ptr + o_x, mask=m_y), mask=m_y)


@jit
def _unpatchify(x_ptr, y_ptr, G0, G1, G2, x_strides, C: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
                CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr):
    """y[b, c, g0 P0 + p0, g1 P1 + p1, g2 P2 + p2] = x[b, (g0 g1 g2), token element].

    grid    B cdiv(elements of a sample, BLOCK), blocks innermost
    layout  x (B, G0 G1 G2, P0 P1 P2 C), any strides, its token elements (p0 p1 p2 c) if CHANNELS_LAST, else (c p0 p1 p2); y contiguous
    math    none: elements are moved
    needs   fewer than 2^31 elements in a sample
    """
    size = G0 * G1 * G2 * (P0 * P1 * P2 * C)
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(size, BLOCK)
    i_b = pid // blocks
    o_y = (pid % blocks * BLOCK).to(tl.int32) + tl.arange(0, BLOCK)
    s2, rest = o_y % (G2 * P2), o_y // (G2 * P2)
    s1, rest = rest % (G1 * P1), rest // (G1 * P1)
    s0, c = rest % (G0 * P0), rest // (G0 * P0)
    token = (s0 // P0 * G1 + s1 // P1) * G2 + s2 // P2
    if CHANNELS_LAST:
        element = ((s0 % P0 * P1 + s1 % P1) * P2 + s2 % P2) * C + c
    else:
        element = ((c * P0 + s0 % P0) * P1 + s1 % P1) * P2 + s2 % P2
    o_x = i_b * x_strides[0] + token.to(tl.int64) * x_strides[1] + element.to(tl.int64) * x_strides[2]
    m_y = o_y < size
    tl.store(y_ptr + i_b * size + o_y, tl.load(x_ptr + o_x, mask=m_y), mask=m_y)


def _launch(kernel, x, y, strides, grid, patch, C, order):
    """Space of fewer than three axes is padded in front with axes of size 1."""
    if not y.numel():
        return
    pad = (1,) * (3 - len(grid))
    blocks = cdiv(y[0].numel(), LAUNCH["BLOCK"])
    kernel[(y.shape[0] * blocks,)](x, y, *pad, *grid, strides, C, *pad, *patch, order == "pqc", **LAUNCH, **OPTIONS)


def _run_patchify(args, outs):
    x, patch, order = args
    (y,) = outs
    grid = [size // p for size, p in zip(x.shape[2:], patch, strict=True)]
    strides = (*x.stride()[:2], *(0,) * (5 - x.dim()), *x.stride()[2:])
    _launch(_patchify, x, y, strides, grid, patch, x.shape[1], order)


def _run_unpatchify(args, outs):
    tokens, patch, grid, order = args
    (y,) = outs
    _launch(_unpatchify, tokens, y, tokens.stride(), grid, patch, y.shape[1], order)


def _refuse(x, *_):
    elements = prod(x.shape[1:])
    return None if elements < 2**31 else f"takes fewer than 2^31 elements in a sample, got {elements}"


PATCHIFY = triton(_run_patchify, refuse=_refuse, plan=lambda *_: "one gather in the order of the tokens")
UNPATCHIFY = triton(_run_unpatchify, refuse=_refuse, plan=lambda *_: "one gather in the order of the image")
