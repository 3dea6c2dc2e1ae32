"""Cosine transforms and gains as matrix products: small planes in one program from read to write, else an axis at a time."""

from functools import lru_cache

import torch

from ...core import device
from ...core.backend import triton
from ...core.jit import OPTIONS, cdiv, dot, jit, narrow, power_of_two, tl
from ...core.launch import pick
from . import reference

PLANE, LARGEST = 64, 2048  # the longest axis of a plane in one program, and of any
# The size is the longest axis. Chosen so that no kernel spills registers; not timed on a GPU yet.
LAUNCH = {
    "plane": ((0, 32, dict(BLOCK=16, num_warps=2, num_stages=1)), (0, None, dict(BLOCK=16, num_warps=4, num_stages=1))),
    "axis": ((100, None, dict(BLOCK_M=64, BLOCK_N=32, BLOCK_K=16, num_warps=4, num_stages=2)),
             (0, None, dict(BLOCK_M=64, BLOCK_N=32, BLOCK_K=16, num_warps=8, num_stages=2))),
}


@jit
def _times(a, b, one):
    """a b. Tensor cores cut their sums off instead of rounding them, so long sums are to be made of several of these: what Triton does not
    know to be 1 keeps it from adding them up there.
    """
    return dot(a, b, tl.zeros([a.shape[0], b.shape[1]], tl.float32), "tf32x3") * tl.cast(one, tl.float32)


@jit
def _from(place, strides):
    return place[0] * strides[0] + place[1] * strides[1] + tl.cast(place[2], tl.int64) * strides[2]


@jit
def _at(x_ptr, place, o_row, o_column, strides, mask):
    """Elements (o_row, o_column) in fp32, of the image and from the row on that place = (i_b, i_c, row) says."""
    x_ptr += _from(place, strides)
    offsets = o_row[:, None] * strides[2] + o_column[None, :] * strides[3]
    return tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)


@jit
def _entry(m_ptr, o_k, o_i, n, GENERATOR: tl.constexpr):
    """Entries (o_k, o_i) of a transform's matrix (n, n), or of the generator g(|k - i|) + g(k + i + 1)."""
    mask = (o_k < n) & (o_i < n)
    if GENERATOR:
        return tl.load(m_ptr + tl.abs(o_k - o_i), mask=mask, other=0.0) + tl.load(m_ptr + (o_k + o_i + 1), mask=mask, other=0.0)
    else:
        return tl.load(m_ptr + (o_k * n + o_i), mask=mask, other=0.0)


@jit
def _part(m_ptr, o_out, o_in, n, KIND: tl.constexpr, PARITY: tl.constexpr):
    """What takes one part of a row, of half its length, to that part of the result: `_axis`'s matrix, columns by rows."""
    if KIND == "blur":
        mirrored = _entry(m_ptr, o_out, n - 1 - o_in, n, True)
        return (_entry(m_ptr, o_out, o_in, n, True) + (mirrored if PARITY == 0 else -mirrored)) * 0.5
    elif KIND == "forward":
        return _entry(m_ptr, 2 * o_out + PARITY, o_in, n, False)
    else:
        return _entry(m_ptr, 2 * o_in + PARITY, o_out, n, False)


@jit
def _columns(x_ptr, place, left, columns_ptr, o_h, o_out, H, W, one, strides, INVERSE: tl.constexpr,
             GENERATOR: tl.constexpr):
    """Columns o_out of a plane's transform: left x C^T, or left x C if INVERSE."""
    t = tl.zeros([o_h.shape[0], o_out.shape[0]], tl.float32)
    for i_w in range(0, W, 16):
        o_w = i_w + tl.arange(0, 16)
        x = _at(x_ptr, place, o_h, o_w, strides, (o_h < H)[:, None] & (o_w < W)[None, :])
        if INVERSE:
            right = _entry(columns_ptr, o_w[:, None], o_out[None, :], W, GENERATOR)
        else:
            right = _entry(columns_ptr, o_out[None, :], o_w[:, None], W, GENERATOR)
        t += _times(x, right, one)
    return _times(left, t, one)


@jit
def _plane(x_ptr, gain_ptr, eps_ptr, gain_eps_ptr, noise_ptr, gain_noise_ptr, y_ptr, rows_ptr, columns_ptr, C, H, W, one,
           strides, KIND: tl.constexpr, WIDTH_H: tl.constexpr, WIDTH_W: tl.constexpr, BLOCK: tl.constexpr):
    """A plane's transform (KIND "forward" or "inverse"), `frequency_mix` ("mix") or a blur ("blur", base and sigma as gains).

    grid    B C
    layout  the first seven (B, C, H, W), any strides, and the strides of each; all but x and y may be None; rows, columns: what `_matrix`
            or, per sample, `_generator` makes
    math    columns of the transform, a block at a time: for a mix multiplied by their gains and brought back at once, summed over the
            blocks; in fp32, products on pairs of tf32; rounded once
    needs   WIDTH_H >= H, WIDTH_W >= W, all three powers of two of at least 16
    """
    pid = tl.program_id(0).to(tl.int64)
    i_b = pid // C
    place = (i_b, pid % C, 0)
    o_h, o_w = tl.arange(0, WIDTH_H), tl.arange(0, WIDTH_W)
    BLUR: tl.constexpr = KIND == "blur"
    INVERSE: tl.constexpr = KIND == "inverse"
    if BLUR:
        rows_ptr += i_b * 2 * H
        columns_ptr += i_b * 2 * W
    y = tl.zeros([WIDTH_H, WIDTH_W], tl.float32)
    for i_w in range(0, W, BLOCK):
        o_u = i_w + tl.arange(0, BLOCK)
        mask = (o_h < H)[:, None] & (o_u < W)[None, :]
        if INVERSE:
            left = _entry(rows_ptr, o_h[None, :], o_h[:, None], H, False)
        else:
            left = _entry(rows_ptr, o_h[:, None], o_h[None, :], H, BLUR)
        u = _columns(x_ptr, place, left, columns_ptr, o_h, o_u, H, W, one, strides[0], INVERSE, BLUR)
        if BLUR:
            u += _at(gain_ptr, place, o_h, o_u, strides[1], mask) * _at(x_ptr, place, o_h, o_u, strides[0], mask)
        if KIND == "mix":
            u *= _at(gain_ptr, place, o_h, o_u, strides[1], mask)
        if eps_ptr is not None:
            eps = _columns(eps_ptr, place, left, columns_ptr, o_h, o_u, H, W, one, strides[2], INVERSE, BLUR)
            u += eps * _at(gain_eps_ptr, place, o_h, o_u, strides[3], mask)
        if noise_ptr is not None:
            u += _at(noise_ptr, place, o_h, o_u, strides[4], mask) * _at(gain_noise_ptr, place, o_h, o_u, strides[5], mask)
        if KIND == "mix":
            u = _times(_entry(rows_ptr, o_h[None, :], o_h[:, None], H, False), u, one)
            y += _times(u, _entry(columns_ptr, o_u[:, None], o_w[None, :], W, False), one)
        else:
            _put(y_ptr, u, place, o_h, o_u, H, W, strides[6])
    if KIND == "mix":
        _put(y_ptr, y, place, o_h, o_w, H, W, strides[6])


@jit
def _mirrored(o, n):
    """The mirror images of the first half's indices; n, beyond the last, for what has none or is its own."""
    return tl.where(o < n // 2, n - 1 - o, n)


@jit
def _put(y_ptr, y, place, o_row, o_column, H, W, strides):
    y_ptr += _from(place, strides)
    offsets = o_row[:, None] * strides[2] + o_column[None, :] * strides[3]
    tl.store(y_ptr + offsets, narrow(y, y_ptr.dtype.element_ty), mask=(o_row < H - place[2])[:, None] & (o_column < W)[None, :])


@jit
def _finish(y_ptr, y, gain_ptr, first_ptr, first_gain_ptr, second_ptr, second_gain_ptr, place, o_m, o_n, M, n, strides):
    """Stores gain y + first_gain first + second_gain second."""
    mask = (o_m < M - place[2])[:, None] & (o_n < n)[None, :]
    if gain_ptr is not None:
        y *= _at(gain_ptr, place, o_m, o_n, strides[2], mask)
    if first_ptr is not None:
        first = _at(first_ptr, place, o_m, o_n, strides[3], mask)
        if first_gain_ptr is not None:
            first *= _at(first_gain_ptr, place, o_m, o_n, strides[4], mask)
        y += first
    if second_ptr is not None:
        y += _at(second_ptr, place, o_m, o_n, strides[5], mask) * _at(second_gain_ptr, place, o_m, o_n, strides[6], mask)
    _put(y_ptr, y, place, o_m, o_n, M, n, strides[1])


@jit
def _axis(x_ptr, y_ptr, gain_ptr, first_ptr, first_gain_ptr, second_ptr, second_gain_ptr, m_ptr, C, M, n, one, strides,
          KIND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """A block of rows times a block of the matrix's columns, along the last axis: "forward", "inverse" or "blur"; then `_finish`.

    grid    B C cdiv(M, BLOCK_M) cdiv(ceil(n / 2), BLOCK_N), columns innermost: neighbours read the same rows
    layout  the first seven (B, C, M, n), any strides, and the strides of each; all but x and y may be None; m: what `_matrix` or, per
            sample, `_generator` makes
    math    sums and differences of mirrored elements times the even and the odd part, in fp32 on pairs of tf32
    needs   blocks that are powers of two of at least 16
    """
    half = (n + 1) // 2
    blocks, rows = tl.cdiv(half, BLOCK_N), tl.cdiv(M, BLOCK_M)
    pid = tl.program_id(0).to(tl.int64)
    i_n, pid = (pid % blocks).to(tl.int32), pid // blocks
    i_m, pid = (pid % rows).to(tl.int32), pid // rows
    i_b = pid // C
    place = (i_b, pid % C, i_m * BLOCK_M)
    if KIND == "blur":
        m_ptr += i_b * 2 * n
    o_m, o_n = tl.arange(0, BLOCK_M), i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m = (o_m < M - place[2])[:, None]
    even = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    odd = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i_k in range(0, half, BLOCK_K):
        o_k = i_k + tl.arange(0, BLOCK_K)
        first, second = m_m & (o_k < half)[None, :], m_m & (o_k < n // 2)[None, :]
        if KIND == "inverse":
            a = _at(x_ptr, place, o_m, 2 * o_k, strides[0], first)
            b = _at(x_ptr, place, o_m, 2 * o_k + 1, strides[0], second)
        else:
            x = _at(x_ptr, place, o_m, o_k, strides[0], first)
            mirrored = _at(x_ptr, place, o_m, n - 1 - o_k, strides[0], second)
            a, b = x + mirrored, x - mirrored
        even += _times(a, _part(m_ptr, o_n[None, :], o_k[:, None], n, KIND, 0), one)
        odd += _times(b, _part(m_ptr, o_n[None, :], o_k[:, None], n, KIND, 1), one)
    if KIND == "forward":
        _finish(y_ptr, even, gain_ptr, first_ptr, first_gain_ptr, second_ptr, second_gain_ptr, place, o_m, 2 * o_n, M, n, strides)
        _finish(y_ptr, odd, gain_ptr, first_ptr, first_gain_ptr, second_ptr, second_gain_ptr, place, o_m, 2 * o_n + 1, M, n, strides)
    else:
        o_n = tl.where(o_n < half, o_n, n)
        _finish(y_ptr, even + odd, gain_ptr, first_ptr, first_gain_ptr, second_ptr, second_gain_ptr, place, o_m, o_n, M, n, strides)
        _finish(y_ptr, even - odd, gain_ptr, first_ptr, first_gain_ptr, second_ptr, second_gain_ptr, place, o_m, _mirrored(o_n, n), M,
                n, strides)


@lru_cache(32)
def _matrix(n, where, stream):
    return reference.matrix(n, torch.empty(0, dtype=torch.float64, device=where)).float()


@lru_cache(32)
def _cosines(n, where, stream):
    """(n, 2 n), in float64: gains times this are `_generator`'s numbers."""
    k, m = torch.arange(n, device=where).unsqueeze(1), torch.arange(2 * n, device=where)
    return torch.cos((k * m % (2 * n)).double() * (torch.pi / n)) * torch.where(k > 0, 1.0, 0.5).double() / n


def _kept(table, n, x):
    """table(n), on x's device, for this and later calls on the current stream: another might read it before it is written. Under capture,
    where nothing is written before the replay, for this call alone.
    """
    if not x.is_cuda:
        return table(n, x.device, None)
    stream = torch.cuda.current_stream(x.device)
    return (table.__wrapped__ if torch.cuda.is_current_stream_capturing() else table)(n, x.device, stream.cuda_stream)


def _generator(gain):
    """(B, 2 n): g with (D^T diag(gain) D)_ij = g(|i - j|) + g(i + j + 1), by cos a cos b = (cos(a - b) + cos(a + b)) / 2."""
    return (gain.double() @ _kept(_cosines, gain.shape[1], gain)).float()


def _images(x, shape):
    """x, expanded to `shape`, as (outer, inner, rows, columns); copied if LARGEST rows of a plane span more than int32 offsets reach."""
    if x is None:
        return None
    x = x.expand(shape)
    if sum((min(n, LARGEST) - 1) * stride for n, stride in zip(x.shape[-2:], x.stride()[-2:], strict=True)) >= 2**31:
        x = x.contiguous()
    return x.reshape(*(1,) * (4 - x.dim()), *x.shape) if x.dim() < 4 else x.flatten(0, -4)


def _strides(*images):
    return tuple((0, 0, 0, 0) if x is None else x.stride() for x in images)


def _fits(x, dims):
    return dims == 2 and max(x.shape[-2:]) <= PLANE


def _run_plane(kind, matrices, x, y, gain=None, eps=None, gain_eps=None, noise=None, gain_noise=None):
    B, C, H, W = x.shape
    widths = [power_of_two(n, least=16) for n in (H, W)]
    tensors = (x, gain, eps, gain_eps, noise, gain_noise, y)
    _plane[(B * C,)](*tensors, *matrices, C, H, W, 1.0, _strides(*tensors), kind, *widths,
                     **pick(LAUNCH["plane"], device.architecture(x.device), max(widths)), **OPTIONS)


def _run_axis(kind, matrix, x, y, gain=None, first=None, first_gain=None, second=None, second_gain=None):
    B, C, M, n = x.shape
    chosen = pick(LAUNCH["axis"], device.architecture(x.device), n)
    tensors = (x, y, gain, first, first_gain, second, second_gain)
    grid = (B * C * cdiv(M, chosen["BLOCK_M"]) * cdiv(cdiv(n, 2), chosen["BLOCK_N"]),)
    _axis[grid](*tensors, matrix, C, M, n, 1.0, _strides(*tensors), kind, **chosen, **OPTIONS)


def _run_axes(kind, matrices, x, y, *more):
    """Along the last axis, and the one before it too if there are two matrices; `more` joins the last."""
    if len(matrices) == 2:
        between = x.new_empty(x.shape, dtype=torch.float32)
        _run_axis(kind, matrices[1], x, between)
        x, y, *more = (None if t is None else t.mT for t in (between, y, *more))
    _run_axis(kind, matrices[0], x, y, *more)


def _matrices(x, dims):
    return [_kept(_matrix, n, x) for n in x.shape[-dims:]]


def _run_dct(args, outs):
    x, dims, inverse = args
    if x.numel():
        kind, matrices = "inverse" if inverse else "forward", _matrices(x, dims)
        x, y = (_images(t, x.shape) for t in (x, outs[0]))
        if _fits(x, dims):
            _run_plane(kind, matrices, x, y)
        else:
            _run_axes(kind, matrices, x, y)


def _run_mix(args, outs):
    *tensors, dims = args
    x = args[0]
    if x.numel():
        matrices = _matrices(x, dims)
        x, gain, eps, gain_eps, noise, gain_noise, y = (_images(t, x.shape) for t in (*tensors, outs[0]))
        if _fits(x, dims):
            _run_plane("mix", matrices, x, y, gain, eps, gain_eps, noise, gain_noise)
            return
        total = x.new_empty(x.shape, dtype=torch.float32)
        _run_axes("forward", matrices, x, total, gain, noise, gain_noise, None, None)
        if eps is not None:
            _run_axes("forward", matrices, eps, total, gain_eps, total, None, None, None)
        _run_axes("inverse", matrices, total, y)


def _run_blur(args, outs):
    x, width, signal, floor, noise, sigma = args
    rows, columns, base = reference.blur_factors(x, width, signal, floor)
    if x.numel():
        x, noise, y = (_images(t, x.shape) for t in (x, noise, outs[0]))
        base, sigma = (None if s is None else s.view(-1, 1, 1, 1).expand(x.shape) for s in (base, sigma))
        matrices = [_generator(gain) for gain in (rows, columns)]
        if _fits(x, 2):
            _run_plane("blur", matrices, x, y, base, None, None, noise, sigma)
        else:
            _run_axes("blur", matrices, x, y, None, x, base, noise, sigma)


def _refuse(x, dims):
    longest = max(x.shape[-dims:], default=0)
    return None if longest <= LARGEST else f"takes axes of at most {LARGEST} elements, got {longest}"


def _plan(x, dims):
    return "a plane per program, products of its mirrored quarters" if _fits(x, dims) else "an axis per kernel, products of mirrored halves"


DCT = triton(_run_dct, refuse=lambda x, dims, _: _refuse(x, dims), plan=lambda x, dims, _: _plan(x, dims))
MIX = triton(_run_mix, refuse=lambda x, *args: _refuse(x, args[-1]), plan=lambda x, *args: _plan(x, args[-1]))
BLUR = triton(_run_blur, refuse=lambda x, *_: _refuse(x, 2), plan=lambda x, *_: _plan(x, 2))
