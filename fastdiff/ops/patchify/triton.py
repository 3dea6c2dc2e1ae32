"""Images to patches and back: patchify in the order of its tokens, the others in the order of the image."""

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
def _by_image(image_ptr, patches_ptr, G0, G1, G2, image_strides, patches_strides, C: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr,
              P2: tl.constexpr, CHANNELS_LAST: tl.constexpr, TO_PATCHES: tl.constexpr, BLOCK: tl.constexpr):
    """image[b, c, g0 P0 + p0, g1 P1 + p1, g2 P2 + p2] = patches[b, patch element, g0, g1, g2], or the other way round if TO_PATCHES.

    grid    B cdiv(elements of a sample, BLOCK), blocks innermost
    layout  image (B, C, G0 P0, G1 P1, G2 P2), patches (B, P0 P1 P2 C, G0, G1, G2), any strides; patch elements as in `_patchify`
    math    none: elements are moved
    needs   fewer than 2^31 elements in a sample
    """
    size = G0 * G1 * G2 * (P0 * P1 * P2 * C)
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(size, BLOCK)
    i_b = pid // blocks
    o = (pid % blocks * BLOCK).to(tl.int32) + tl.arange(0, BLOCK)
    s2, rest = o % (G2 * P2), o // (G2 * P2)
    s1, rest = rest % (G1 * P1), rest // (G1 * P1)
    s0, c = rest % (G0 * P0), rest // (G0 * P0)
    if CHANNELS_LAST:
        element = ((s0 % P0 * P1 + s1 % P1) * P2 + s2 % P2) * C + c
    else:
        element = ((c * P0 + s0 % P0) * P1 + s1 % P1) * P2 + s2 % P2
    image_ptr += (i_b * image_strides[0] + c.to(tl.int64) * image_strides[1] + s0.to(tl.int64) * image_strides[2]
                  + s1.to(tl.int64) * image_strides[3] + s2.to(tl.int64) * image_strides[4])
    patches_ptr += (i_b * patches_strides[0] + element.to(tl.int64) * patches_strides[1] + (s0 // P0).to(tl.int64) * patches_strides[2]
                    + (s1 // P1).to(tl.int64) * patches_strides[3] + (s2 // P2).to(tl.int64) * patches_strides[4])
    if TO_PATCHES:
        tl.store(patches_ptr, tl.load(image_ptr, mask=o < size), mask=o < size)
    else:
        tl.store(image_ptr, tl.load(patches_ptr, mask=o < size), mask=o < size)


def _launch(kernel, first, second, grid, strides, C, patch, order, *flags):
    """Space of fewer than three axes is padded in front with axes of size 1. strides: those of an image, or of an image of patches."""
    if not first.numel():
        return
    pad = (1,) * (3 - len(grid))
    strides = ((*s[:2], *(0,) * (5 - len(s)), *s[2:]) for s in strides)
    blocks = cdiv(first[0].numel(), LAUNCH["BLOCK"])
    kernel[(first.shape[0] * blocks,)](first, second, *pad, *grid, *strides, C, *pad, *patch, order == "pqc", *flags, **LAUNCH, **OPTIONS)


def _run_patchify(args, outs):
    x, patch, order = args
    _launch(_patchify, x, outs[0], [size // p for size, p in zip(x.shape[2:], patch, strict=True)], (x.stride(),), x.shape[1], patch, order)


def _run_unpatchify(args, outs):
    tokens, patch, grid, order = args
    (y,) = outs
    b, n, d = tokens.stride()
    strides = (b, d, *(n * prod(grid[i + 1:]) for i in range(len(grid))))
    _launch(_by_image, y, tokens, grid, (y.stride(), strides), y.shape[1], patch, order, False)


def _run_space_to_depth(args, outs):
    x, patch, order = args
    (y,) = outs
    _launch(_by_image, x, y, y.shape[2:], (x.stride(), y.stride()), x.shape[1], patch, order, True)


def _run_depth_to_space(args, outs):
    x, patch, order = args
    (y,) = outs
    _launch(_by_image, y, x, x.shape[2:], (y.stride(), x.stride()), y.shape[1], patch, order, False)


def _refuse(x, *_):
    elements = prod(x.shape[1:])
    return None if elements < 2**31 else f"takes fewer than 2^31 elements in a sample, got {elements}"


PATCHIFY = triton(_run_patchify, refuse=_refuse, plan=lambda *_: "one gather in the order of the tokens")
UNPATCHIFY = triton(_run_unpatchify, refuse=_refuse, plan=lambda *_: "one gather in the order of the image")
SPACE_TO_DEPTH = triton(_run_space_to_depth, refuse=_refuse, plan=lambda *_: "one scatter in the order of the image")
DEPTH_TO_SPACE = triton(_run_depth_to_space, refuse=_refuse, plan=lambda *_: "one gather in the order of the image")
