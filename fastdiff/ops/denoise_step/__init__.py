"""Noise added to data, guidance, and one step of a sampler: each one pass over the image."""

import torch

from ...core.backend import cpu
from ...core.check import dims, fail, flag, option, pair, tensor
from ...core.contract import constant, contract
from . import reference, triton

_PREDICTIONS = ("eps", "x0", "v")
_COEFFICIENTS = ("signal", "sigma", "to_x0", "to_eps", "to_noise")


def _check(op, images, coefficients):
    """Refuses images unless alike in shape, coefficients unless (B,); returns an empty tensor like the first image."""
    (first, x), *_ = images.items()
    for name, image in images.items():
        if image is not None and image.dim() != x.dim():
            fail(op, f"{name} wants {x.dim()} dimensions as {first} has, got {image.dim()}: {tuple(image.shape)}")
    layout = " ".join(("B", *(f"axis{i}" for i in range(1, x.dim()))))
    dims(op, **{name: (image, layout) for name, image in images.items()})
    wanted = torch.float64 if x.dtype is torch.float64 else torch.float32
    for name, c in coefficients.items():
        if c is not None:
            if dims(op, **{name: (c, "B")})["B"] != x.shape[0]:
                fail(op, f"{name} has B = {c.shape[0]}, but {first} has B = {x.shape[0]}")
            if c.dtype is not wanted:
                fail(op, f"{name} wants {wanted} beside {first} of {x.dtype}, got {c.dtype}")
            if c.device != x.device:
                fail(op, f"{name} is on {c.device}, but {first} is on {x.device}")
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if channels_last and not x.is_contiguous() and x.is_contiguous(memory_format=channels_last):
        return torch.empty_like(x, memory_format=channels_last)
    return x.new_empty(x.shape)


def _add_noise_outputs(x, noise, signal, sigma):
    return _check("add_noise", dict(x=x, noise=noise), dict(signal=signal, sigma=sigma))


def _guide_outputs(cond, uncond, weight, rescale):
    return _check("guide", dict(cond=cond, uncond=uncond), dict(weight=weight))


def _step_outputs(op):
    def outputs(x, pred, signal, sigma, to_x0, to_eps, to_noise, noise, v, log_ratio, prediction, clip, rederive):
        return _check(op, {"x": x, "pred": pred, "noise": noise, "variance[0]": v},
                      {"signal": signal, "sigma": sigma, "to_x0": to_x0, "to_eps": to_eps, "to_noise": to_noise, "variance[1]": log_ratio})

    return outputs


def _two_outputs(*args):
    y = _step_outputs("denoise_step_with_x0")(*args)
    return y, torch.empty_like(y)


_STEP = ("(Tensor x, Tensor pred, Tensor signal, Tensor sigma, Tensor to_x0, Tensor to_eps, Tensor? to_noise, Tensor? noise, Tensor? v, "
         "Tensor? log_ratio, str prediction, float? clip, bool rederive)")
ADD_NOISE = contract("add_noise(Tensor x, Tensor noise, Tensor signal, Tensor sigma) -> Tensor", outputs=_add_noise_outputs,
                     reference=reference.add_noise, module=__name__,
                     backends=(triton.ADD_NOISE, cpu("add_noise")), entries=("add_noise_eager",))
GUIDE = contract("guide(Tensor cond, Tensor uncond, Tensor weight, float rescale) -> Tensor", outputs=_guide_outputs,
                 reference=reference.guide, backends=(triton.GUIDE, cpu("guide")), module=__name__, entries=("guide_eager",))
STEP = contract(f"denoise_step{_STEP} -> Tensor", outputs=_step_outputs("denoise_step"), reference=reference.denoise_step,
                backends=(triton.STEP, cpu("denoise_step")), module=__name__, entries=("denoise_step_eager",))
STEP_WITH_X0 = contract(f"denoise_step_with_x0{_STEP} -> (Tensor, Tensor)", outputs=_two_outputs, reference=reference.denoise_step_with_x0,
                        backends=(triton.STEP, cpu("denoise_step_with_x0")), module=__name__, entries=("denoise_step_with_x0_eager",))


def _scaled(c, x):
    return (reference.spread(c, x) * x).to(x.dtype)


def _sum(x, y, c):
    """sum x y per sample, in the dtype of c."""
    product = x.to(c.dtype) * y
    return product.sum(tuple(range(1, x.dim()))) if x.dim() > 1 else product


def _add_noise_backward(ctx, dz):
    if dz is None:
        return (None,) * 4
    (x, noise, signal, sigma), wants = ctx.saved_tensors, ctx.wants
    return (_scaled(signal, dz) if wants[0] else None, _scaled(sigma, dz) if wants[1] else None,
            _sum(dz, x, signal) if wants[2] else None, _sum(dz, noise, sigma) if wants[3] else None)


def _add_noise_jvp(ctx, *tangents):
    x, noise, signal, sigma = args = ctx.saved_tensors
    dx, dnoise, dsignal, dsigma = (torch.zeros_like(p) if d is None else d for d, p in zip(tangents, args, strict=True))
    return (_scaled(signal, dx) + _scaled(sigma, dnoise)) + (_scaled(dsignal, x) + _scaled(dsigma, noise))


ADD_NOISE.autograd(save=lambda ctx, args, outs: args, backward=_add_noise_backward, jvp=_add_noise_jvp)


# Without rescaling guide is linear in its images, and in the weight.
def _guide_backward(ctx, dy):
    if dy is None:
        return (None,) * 4
    (cond, uncond, weight), wants = ctx.saved_tensors, ctx.wants
    return (_scaled(weight, dy) if wants[0] else None, _scaled(1 - weight, dy) if wants[1] else None,
            _sum(dy, cond.to(weight.dtype) - uncond, weight) if wants[2] else None, None)


def _guide_jvp(ctx, dcond, duncond, dweight, _):
    cond, uncond, weight = ctx.saved_tensors
    dy = None
    if dcond is not None or duncond is not None:
        dy = GUIDE(*(torch.zeros_like(x) if d is None else d for x, d in ((cond, dcond), (uncond, duncond))), weight, 0.0)
    if dweight is not None:
        along = (reference.spread(dweight, cond) * (cond.to(weight.dtype) - uncond)).to(cond.dtype)
        dy = along if dy is None else dy + along
    return dy


GUIDE.autograd(save=lambda ctx, args, outs: args[:3], backward=_guide_backward, jvp=_guide_jvp, applies=lambda *args: args[3] == 0)


# Without clipping and learned variance a step is linear in its images, y = a x + b pred + to_noise noise. For the other steps, and where a
# coefficient's derivative is wanted, the reference stands in.
def _shares(signal, sigma, to_x0, to_eps, prediction):
    """(a, b) per sample."""
    if prediction == "eps":
        return to_x0 / signal, to_eps - to_x0 * (sigma / signal)
    if prediction == "x0":
        return to_eps / sigma, to_x0 - to_eps * (signal / sigma)
    power = signal.square() + sigma.square()
    return (to_x0 * signal + to_eps * sigma) / power, (to_eps * signal - to_x0 * sigma) / power


def _step_backward(ctx, dy):
    if dy is None:
        return (None,) * 13
    *coefficients, to_noise = ctx.saved_tensors
    a, b = _shares(*(c.double() for c in coefficients), ctx.args[10])
    wide = coefficients[0].dtype
    dx, dpred, dnoise = (_scaled(c.to(wide), dy) if want else None
                         for c, want in ((a, ctx.wants[0]), (b, ctx.wants[1]), (to_noise, ctx.wants[7])))
    return dx, dpred, *(None,) * 5, dnoise, *(None,) * 5


def _step_jvp(ctx, dx, dpred, *tangents):
    *coefficients, to_noise = ctx.saved_tensors
    dnoise = tangents[5]
    like = next(d for d in (dx, dpred, dnoise) if d is not None)
    dx, dpred = (torch.zeros_like(like) if d is None else d for d in (dx, dpred))
    return STEP(dx, dpred, *coefficients, None if dnoise is None else to_noise, dnoise, None, None, *ctx.args[10:])


STEP.autograd(save=lambda ctx, args, outs: args[2:7], backward=_step_backward, jvp=_step_jvp,
              applies=lambda *args: args[11] is None and args[8] is None and constant(*args[2:7]))


for _made in (ADD_NOISE, GUIDE, STEP, STEP_WITH_X0):
    _made.vmap_batch()


def _number(value):
    return isinstance(value, int | float | torch.SymFloat) and not isinstance(value, bool)


def _per_sample(op, first, x, coefficients):
    """The coefficients as tensors (B,): a number stands for all samples."""
    if tensor(op, first, x).dim() < 1:
        fail(op, f"{first} wants at least one dimension (B, ...), got none")
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    return tuple(torch.full(x.shape[:1], c, dtype=wide, device=x.device) if _number(c) else c if c is None else tensor(op, name, c)
                 for name, c in coefficients.items())


def add_noise(x, noise, signal, sigma):
    """The forward process of a diffusion: z = signal x + sigma noise, per sample.

    Shapes   x, noise (B, ...), any strides; signal, sigma (B,) or a number for all samples -> z as x, contiguous or channels-last as x
    Dtypes   x, noise float32, float16, bfloat16 with signal, sigma float32; float64 with float64; computed in float32 (float64 in the
             reference)
    Units    sigma in units of the noise
    Grads    all four; every order
    Raises   ValueError naming the argument, what was wanted and what was given; TypeError for a non-tensor
    Source   Ho et al. 2020, equation 4; Song et al. 2021, section 3
    """
    if type(signal) is not torch.Tensor or type(sigma) is not torch.Tensor:
        signal, sigma = _per_sample("add_noise", "x", x, dict(signal=signal, sigma=sigma))
    args = (x, noise, signal, sigma)
    z = ADD_NOISE.eager(args)
    return ADD_NOISE(*args) if z is None else z


def guide(cond, uncond, weight, *, rescale=0.0):
    """Classifier-free guidance: y = uncond + weight (cond - uncond), then y (rescale std(cond) / std(y) + 1 - rescale), std per sample.

    Shapes   cond, uncond (B, ...), any strides; weight (B,) or a number for all samples -> y as cond, contiguous or channels-last as cond
    Dtypes   cond, uncond float32, float16, bfloat16 with weight float32; float64 with float64; computed in float32 (float64 in the
             reference)
    Units    weight 1 is the conditional prediction alone (other papers' w is weight - 1); rescale in [0, 1]; std over n - 1
    Grads    cond, uncond, weight; every order
    Raises   ValueError naming the argument, what was wanted and what was given; TypeError for a non-tensor
    Source   Ho & Salimans 2022; rescale: Lin et al. 2024, section 3.4
    """
    op = "guide"
    if not _number(rescale):
        raise TypeError(f"{op}: rescale wants a float, got {rescale!r}")
    if not 0 <= rescale <= 1:
        fail(op, f"rescale wants a value in [0, 1], got {rescale}")
    if type(weight) is not torch.Tensor:
        (weight,) = _per_sample(op, "cond", cond, dict(weight=weight))
    args = (cond, uncond, weight, rescale)
    y = GUIDE.eager(args)
    return GUIDE(*args) if y is None else y


def _step_arguments(op, x, pred, coefficients, prediction, clip, noise, variance, rederive):
    option(op, "prediction", prediction, _PREDICTIONS)
    flag(op, "rederive", rederive)
    if clip is not None:
        if type(clip) is not float and not _number(clip):
            raise TypeError(f"{op}: clip wants a float or None, got {clip!r}")
        if not clip > 0:
            fail(op, f"clip wants a value above 0, got {clip}")
    to_noise = coefficients[4]
    if (noise is None) is not (to_noise is None):
        given, absent = ("to_noise", "noise") if noise is None else ("noise", "to_noise")
        fail(op, f"{given} wants {absent} beside it, got None")
    if variance is None:
        v = log_ratio = None
    else:
        if noise is None:
            fail(op, "variance wants noise beside it, got None")
        v, log_ratio = pair(op, "variance", variance, "(v, log_ratio)")
    for c in coefficients:
        if type(c) is not torch.Tensor and c is not None:
            coefficients = _per_sample(op, "x", x, dict(zip(_COEFFICIENTS, coefficients, strict=True)))
            break
    return x, pred, *coefficients, noise, v, log_ratio, prediction, clip, rederive


def denoise_step(x, pred, signal, sigma, to_x0, to_eps, to_noise=None, *, prediction="eps", clip=None, noise=None, variance=None,
                 rederive=True):
    """One step of a sampler: y = to_x0 x0 + to_eps eps + to_noise noise, where x = signal x0 + sigma eps and pred says what x0 is.

    "eps"    x0 = (x - sigma pred) / signal, eps = pred
    "x0"     x0 = pred, eps = (x - signal pred) / sigma
    "v"      x0 = (signal x - sigma pred) / (signal^2 + sigma^2), eps = (signal pred + sigma x) / (signal^2 + sigma^2)
    clip     x0 is clamped to [-clip, clip]; with rederive, eps = (x - signal x0) / sigma of the clamped x0, else it stays the prediction's
    variance (v, log_ratio): noise is multiplied by to_noise exp(log_ratio (v + 1) / 4) instead, so that v = -1 has the variance to_noise^2
             and v = 1 has exp(log_ratio) times that, with their logarithms interpolated between (learned range)

    With g = signal^2 at the present level and g' at the next, sigma^2 = 1 - g:
    DDIM     to_x0 = sqrt(g'), to_eps = sqrt(1 - g' - s^2), to_noise = s = eta sqrt((1 - g') / (1 - g)) sqrt(1 - g / g')
    DDPM     to_x0 = sqrt(g'), to_eps = (g / g') ^ (1/2) (1 - g') / sqrt(1 - g), to_noise^2 = (1 - g / g') (1 - g') / (1 - g) ("small") or
             1 - g / g' ("large"); log_ratio = log(large / small)
    SDEs     x + a score + b noise, score = -eps / sigma: to_x0 = signal, to_eps = sigma - a / sigma, to_noise = b

    Shapes   x, pred, noise, v (B, ...), any strides; signal, sigma, to_x0, to_eps, to_noise (B,) or a number for all samples;
             log_ratio (B,) -> y as x, contiguous or channels-last as x
    Dtypes   x, pred, noise, v float32, float16, bfloat16 with the others float32; float64 with float64; computed in float32 (float64 in
             the reference)
    Grads    all tensors; every order; 0 through an x0 that was clamped
    Raises   ValueError naming the argument, what was wanted and what was given; TypeError for a non-tensor
    Source   Ho et al. 2020; Song et al. 2021 (DDIM, score SDEs); Nichol & Dhariwal 2021, equation 15; Salimans & Ho 2022 (v)
    """
    args = _step_arguments("denoise_step", x, pred, (signal, sigma, to_x0, to_eps, to_noise), prediction, clip, noise, variance, rederive)
    y = STEP.eager(args, optional=args[6:10])
    return STEP(*args) if y is None else y


def denoise_step_with_x0(x, pred, signal, sigma, to_x0, to_eps, to_noise=None, *, prediction="eps", clip=None, noise=None, variance=None,
                         rederive=True):
    """`denoise_step` and the clamped x0 that it found: (y, x0), for self-conditioning and for a sampler's result.

    Shapes   as in `denoise_step`; x0 as y
    Dtypes   as in `denoise_step`
    Grads    through both results
    Raises   as in `denoise_step`
    Source   Chen et al. 2023, section 3.2
    """
    args = _step_arguments("denoise_step_with_x0", x, pred, (signal, sigma, to_x0, to_eps, to_noise), prediction, clip, noise, variance,
                           rederive)
    both = STEP_WITH_X0.eager(args, optional=args[6:10])
    return STEP_WITH_X0(*args) if both is None or both[0] is None else both
