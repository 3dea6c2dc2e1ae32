"""Guidance: denoisers made of denoisers, gradients of classifiers, bounds on x0."""

import torch

from ..core.check import fail
from ..ops import guide


def classifier_free(cond, uncond, weight, *, rescale=0.0, channels=None):
    """A denoiser that gives uncond + weight (cond - uncond), by `ops.guide`.

    cond, uncond  denoisers; uncond None: cond gives both at once, the conditional batch first, the unconditional after it
    weight        a number or (B,); 1 is cond alone
    rescale       share of the correction to cond's standard deviation
    channels      guide the first so many alone (DiT: 3); the rest, such as a learned variance, is cond's
    A state carried through steps is cond's.

    Source   Ho & Salimans 2022; rescale: Lin et al. 2024, section 3.4
    """

    def denoiser(z, time, *carried):
        both = cond(z, time, *carried)
        both, *state = both if isinstance(both, tuple) else (both,)
        if uncond is None:
            if both.shape[0] != 2 * z.shape[0]:
                fail("classifier_free", f"cond wants to give 2 B = {2 * z.shape[0]} samples where uncond is None, got {both.shape[0]}")
            c, u = both.chunk(2)
        else:
            other = uncond(z, time, *carried)
            c, u = both, other[0] if isinstance(other, tuple) else other
        if channels is None:
            y = guide(c, u, weight, rescale=rescale)
        else:
            y = torch.cat([guide(c[:, :channels], u[:, :channels], weight, rescale=rescale), c[:, channels:]], 1)
        return (y, *state) if state else y

    return denoiser


def classifier(log_prob, scale):
    """The gradient that `sample` takes: scale d log_prob(z, time) / dz, log_prob (B,) being any differentiable function.

    Source   Dhariwal & Nichol 2021, algorithms 1 and 2
    """

    def gradient(z, time):
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            return scale * torch.autograd.grad(log_prob(z, time).sum(), z)[0]

    return gradient


def dynamic_threshold(x0, quantile=0.995, most=torch.inf):
    """clamp(x0, -s, s) / s, s = the quantile of |x0| per sample, within [1, most].

    Source   Saharia et al. 2022 (Imagen), section 2.3
    """
    if not (0 <= quantile <= 1 and most >= 1):
        fail("dynamic_threshold", f"wants a quantile in [0, 1] and most of at least 1, got {quantile} and {most}")
    size = x0.flatten(1).abs()
    s = torch.quantile(size if size.dtype is torch.float64 else size.float(), quantile, dim=1).clamp(1, most)
    s = s.view(-1, *(1,) * (x0.dim() - 1)).to(x0.dtype)
    return torch.minimum(torch.maximum(x0, -s), s) / s
