"""Noise added, guidance and one step of a sampler: element by element over dense samples, coefficients folded per sample in fp64."""

import torch

from ...core.backend import triton
from ...core.jit import OPTIONS, cdiv, jit, narrow, power_of_two, tl

LAUNCH = dict(BLOCK=1024, num_warps=4)  # not tuned on a GPU yet
PIECES = 1 << 14  # most pieces of a sample whose moments one program joins


@jit
def _place(size, BLOCK: tl.constexpr):
    """(sample, its elements that this program computes, their mask)."""
    pid = tl.program_id(0).to(tl.int64)
    pieces = tl.cdiv(size, BLOCK)
    i_b = pid // pieces
    o_x = pid % pieces * BLOCK + tl.arange(0, BLOCK)
    return i_b, o_x, o_x < size


@jit
def _image(x_ptr, i_b, stride, o_x, m_x):
    return tl.load(x_ptr + i_b * stride + o_x, mask=m_x, other=0.0).to(tl.float32)


@jit
def _add_noise(x_ptr, noise_ptr, signal_ptr, sigma_ptr, y_ptr, size, strides, BLOCK: tl.constexpr):
    """y = signal x + sigma noise.

    grid    B cdiv(size, BLOCK), pieces of a sample innermost
    layout  samples of `size` dense elements, strides[0], strides[1] apart; signal, sigma (B,) fp32, strides[2], strides[3]; y dense
    math    fp32, rounded once
    needs   nothing
    """
    i_b, o_x, m_x = _place(size, BLOCK)
    x, noise = _image(x_ptr, i_b, strides[0], o_x, m_x), _image(noise_ptr, i_b, strides[1], o_x, m_x)
    y = tl.load(signal_ptr + i_b * strides[2]) * x + tl.load(sigma_ptr + i_b * strides[3]) * noise
    tl.store(y_ptr + i_b * size + o_x, narrow(y, y_ptr.dtype.element_ty), mask=m_x)


@jit
def _moments_of(x, m_x, n):
    """(mean, sum of squares about it) of the n elements in the mask, found about the first: of equal elements both are exact."""
    first = tl.sum(tl.where(tl.arange(0, x.shape[0]) == 0, x, 0.0), 0)
    mean = first + tl.sum(tl.where(m_x, x - first, 0.0), 0) / n
    apart = tl.where(m_x, x - mean, 0.0)
    return mean, tl.sum(apart * apart, 0)


@jit
def _moments(cond_ptr, uncond_ptr, weight_ptr, moments_ptr, size, strides, BLOCK: tl.constexpr):
    """Mean and sum of squares about it, of cond and of uncond + weight (cond - uncond), over each piece of a sample.

    grid    as in `_add_noise`
    layout  as in `_add_noise`, with weight for the coefficients; moments (B pieces, 4) fp32
    math    fp32
    needs   nothing
    """
    i_b, o_x, m_x = _place(size, BLOCK)
    cond, uncond = _image(cond_ptr, i_b, strides[0], o_x, m_x), _image(uncond_ptr, i_b, strides[1], o_x, m_x)
    guided = uncond + tl.load(weight_ptr + i_b * strides[2]) * (cond - uncond)
    n = tl.sum(m_x.to(tl.float32), 0)
    mean, squares = _moments_of(cond, m_x, n)
    guided_mean, guided_squares = _moments_of(guided, m_x, n)
    moments_ptr += tl.program_id(0).to(tl.int64) * 4
    tl.store(moments_ptr, mean)
    tl.store(moments_ptr + 1, squares)
    tl.store(moments_ptr + 2, guided_mean)
    tl.store(moments_ptr + 3, guided_squares)


@jit
def _joined(mean_ptr, i_b, size, pieces, BLOCK: tl.constexpr, PIECES: tl.constexpr):
    """The sum of squares about the mean of a sample, from those of its pieces."""
    o_p = tl.arange(0, PIECES)
    m_p = o_p < pieces
    n = tl.where(m_p, tl.minimum(BLOCK, size - o_p * BLOCK), 0).to(tl.float32)
    mean_ptr += i_b * pieces * 4
    mean = tl.load(mean_ptr + o_p * 4, mask=m_p, other=0.0)
    squares = tl.load(mean_ptr + o_p * 4 + 1, mask=m_p, other=0.0)
    first = tl.sum(tl.where(o_p == 0, mean, 0.0), 0)
    whole = first + tl.sum(tl.where(m_p, n * (mean - first), 0.0), 0) / size
    return tl.sum(tl.where(m_p, squares + n * (mean - whole) * (mean - whole), 0.0), 0)


@jit
def _guide(cond_ptr, uncond_ptr, weight_ptr, moments_ptr, y_ptr, rescale, size, strides, BLOCK: tl.constexpr, PIECES: tl.constexpr):
    """y = uncond + weight (cond - uncond), with moments_ptr times rescale std(cond) / std(that) + 1 - rescale.

    grid    as in `_add_noise`
    layout  as in `_moments`; moments_ptr None for no rescaling
    math    fp32, rounded once
    needs   PIECES a power of two, at least the pieces of a sample
    """
    i_b, o_x, m_x = _place(size, BLOCK)
    cond, uncond = _image(cond_ptr, i_b, strides[0], o_x, m_x), _image(uncond_ptr, i_b, strides[1], o_x, m_x)
    y = uncond + tl.load(weight_ptr + i_b * strides[2]) * (cond - uncond)
    if moments_ptr is not None:
        pieces = tl.cdiv(size, BLOCK)
        left = tl.cast(size - 1, tl.float32)
        std = tl.sqrt(_joined(moments_ptr, i_b, size, pieces, BLOCK, PIECES) / left)
        guided_std = tl.sqrt(_joined(moments_ptr + 2, i_b, size, pieces, BLOCK, PIECES) / left)
        share = tl.cast(rescale, tl.float32)
        y = y * (share * (std / guided_std) + (1.0 - share))
    tl.store(y_ptr + i_b * size + o_x, narrow(y, y_ptr.dtype.element_ty), mask=m_x)


@jit
def _step(x_ptr, pred_ptr, signal_ptr, sigma_ptr, to_x0_ptr, to_eps_ptr, to_noise_ptr, noise_ptr, v_ptr, log_ratio_ptr, y_ptr, x0_ptr, clip,
          size, strides, PREDICTION: tl.constexpr, CLIPPED: tl.constexpr, REDERIVE: tl.constexpr, BLOCK: tl.constexpr):
    """y = to_x0 x0 + to_eps eps + to_noise exp(log_ratio (v + 1) / 4) noise, x0 and eps from x and pred; also x0 where x0_ptr is given.

    grid    as in `_add_noise`
    layout  x, pred, noise, v: samples of `size` dense elements, strides[0:4] apart; signal, sigma, to_x0, to_eps, to_noise, log_ratio (B,)
            fp32, strides[4:10]; noise, to_noise and v, log_ratio may be None; y, x0 dense
    math    fp32, rounded once; the coefficients of x, pred and x0 in fp64
    needs   nothing
    """
    i_b, o_x, m_x = _place(size, BLOCK)
    signal, sigma = tl.load(signal_ptr + i_b * strides[4]).to(tl.float64), tl.load(sigma_ptr + i_b * strides[5]).to(tl.float64)
    to_x0, to_eps = tl.load(to_x0_ptr + i_b * strides[6]).to(tl.float64), tl.load(to_eps_ptr + i_b * strides[7]).to(tl.float64)
    x, pred = _image(x_ptr, i_b, strides[0], o_x, m_x), _image(pred_ptr, i_b, strides[1], o_x, m_x)
    if PREDICTION == "eps":
        x0_x, x0_pred = 1.0 / signal, -sigma / signal
        x0 = (x - sigma.to(tl.float32) * pred) * x0_x.to(tl.float32)  # the difference may cancel: scaled only then
        eps_x, eps_pred = signal * 0.0, signal * 0.0 + 1.0
    elif PREDICTION == "x0":
        x0_x, x0_pred = sigma * 0.0, sigma * 0.0 + 1.0
        x0 = pred
        eps_x, eps_pred = 1.0 / sigma, -signal / sigma
    else:
        power = signal * signal + sigma * sigma
        x0_x, x0_pred = signal / power, -sigma / power
        x0 = (signal.to(tl.float32) * x - sigma.to(tl.float32) * pred) * (1.0 / power).to(tl.float32)
        eps_x, eps_pred = sigma / power, signal / power
    if CLIPPED:
        bound = tl.cast(clip, tl.float32)
        x0 = tl.where(x0 > bound, bound, x0)
        x0 = tl.where(x0 < -bound, -bound, x0)
        if REDERIVE:
            y = (to_x0 - to_eps * (signal / sigma)).to(tl.float32) * x0 + (to_eps / sigma).to(tl.float32) * x
        else:
            y = to_x0.to(tl.float32) * x0 + ((to_eps * eps_x).to(tl.float32) * x + (to_eps * eps_pred).to(tl.float32) * pred)
    else:
        y = (to_x0 * x0_x + to_eps * eps_x).to(tl.float32) * x + (to_x0 * x0_pred + to_eps * eps_pred).to(tl.float32) * pred
    if noise_ptr is not None:
        scale = tl.load(to_noise_ptr + i_b * strides[8])
        if v_ptr is not None:
            v = _image(v_ptr, i_b, strides[3], o_x, m_x)
            scale = scale * tl.exp((v + 1.0) * (tl.load(log_ratio_ptr + i_b * strides[9]) * 0.25))
        y += scale * _image(noise_ptr, i_b, strides[2], o_x, m_x)
    tl.store(y_ptr + i_b * size + o_x, narrow(y, y_ptr.dtype.element_ty), mask=m_x)
    if x0_ptr is not None:
        tl.store(x0_ptr + i_b * size + o_x, narrow(x0, x0_ptr.dtype.element_ty), mask=m_x)


def _ordered(x, y):
    """x, or a copy of it, whose samples lie in memory as those of y."""
    if x is None or all(a == b or n < 2 for a, b, n in zip(x.stride()[1:], y.stride()[1:], y.shape[1:], strict=True)):
        return x
    return torch.empty_like(y).copy_(x)


def _strides(*tensors):
    return tuple(0 if x is None else x.stride(0) for x in tensors)


def _launch(kernel, y, *args, **settings):
    """Over pieces of the samples of y."""
    size = y[0].numel()
    kernel[(y.shape[0] * cdiv(size, LAUNCH["BLOCK"]),)](*args, **settings, **LAUNCH, **OPTIONS)


def _run_add_noise(args, outs):
    (y,) = outs
    if y.numel():
        x, noise = (_ordered(image, y) for image in args[:2])
        _launch(_add_noise, y, x, noise, *args[2:], y, y[0].numel(), _strides(x, noise, *args[2:]))


def _run_guide(args, outs):
    (y,), (cond, uncond, weight, rescale) = outs, args
    if not y.numel():
        return
    cond, uncond, size, moments = _ordered(cond, y), _ordered(uncond, y), y[0].numel(), None
    pieces, strides = cdiv(size, LAUNCH["BLOCK"]), _strides(cond, uncond, weight)
    if rescale:
        moments = torch.empty(y.shape[0] * pieces, 4, dtype=torch.float32, device=y.device)
        _launch(_moments, y, cond, uncond, weight, moments, size, strides)
    _launch(_guide, y, cond, uncond, weight, moments, y, float(rescale), size, strides, PIECES=power_of_two(pieces) if rescale else 1)


def _run_step(args, outs):
    y, *rest = outs
    if not y.numel():
        return
    x, pred, *coefficients, to_noise, noise, v, log_ratio, prediction, clip, rederive = args
    x, pred, noise, v = (_ordered(image, y) for image in (x, pred, noise, v))
    strides = _strides(x, pred, noise, v, *coefficients, to_noise, log_ratio)
    _launch(_step, y, x, pred, *coefficients, to_noise, noise, v, log_ratio, y, rest[0] if rest else None,
            0.0 if clip is None else float(clip), y[0].numel(), strides, PREDICTION=prediction, CLIPPED=clip is not None, REDERIVE=rederive)


def _refuse_guide(cond, uncond, weight, rescale):
    pieces = cdiv(cond.numel(), max(1, cond.shape[0]) * LAUNCH["BLOCK"])
    return None if not rescale or pieces <= PIECES else f"rescales samples of at most {PIECES * LAUNCH['BLOCK']} elements"


_PLAN = "one kernel over pieces of samples"
ADD_NOISE = triton(_run_add_noise, plan=lambda *_: _PLAN)
GUIDE = triton(_run_guide, refuse=_refuse_guide, plan=lambda *args: "moments of pieces, joined where they are used" if args[3] else _PLAN)
STEP = triton(_run_step, plan=lambda *_: _PLAN)
