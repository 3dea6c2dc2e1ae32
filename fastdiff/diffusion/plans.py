"""Samplers as tables: how each step makes the next z of x0, eps and noise. `sample` runs any of them."""

from typing import NamedTuple

import torch

from ..core.check import fail, option
from .processes import VE, VP, SubVP


class Plan(NamedTuple):
    """One row a step, float64 (S,): z' = to_x0 x0 + to_eps eps + to_noise noise, where z = signal x0 + sigma eps.

    time       what the denoiser is told, (S,)
    to_noise   None: no noise is drawn; the last step adds none
    log_ratio  ln of the largest over the smallest variance of a step, where the network chooses between them; else None
    trust      of a Langevin corrector's step size; None: 1
    prediction "eps", "x0", "v", or "score", with which z' = to_x0 z + to_eps score + to_noise noise
    clip       x0 is clamped to [-clip, clip]
    threshold  (quantile, most): x0 is clamped to [-s, s] and divided by s, the quantile of |x0| per sample, within [1, most]
    rederive   eps follows from the bounded x0; else it stays the prediction's
    of_z       to_eps multiplies z, not eps: the posterior's mean as others write it, to round as they do, for one more pass
    guided     a classifier's gradient g acts on "pred", eps - sigma g, or on the "mean", + variance g
    """

    time: torch.Tensor
    signal: torch.Tensor
    sigma: torch.Tensor
    to_x0: torch.Tensor
    to_eps: torch.Tensor
    to_noise: torch.Tensor | None = None
    log_ratio: torch.Tensor | None = None
    trust: torch.Tensor | None = None
    prediction: str = "eps"
    clip: float | None = None
    threshold: tuple | None = None
    rederive: bool = True
    of_z: bool = False
    guided: str = "pred"


def ddpm(steps, *, prediction="eps", variance="small", clip=None, threshold=None):
    """Draws from the posterior q(z_s | z_t, x0), for any signal and sigma.

    variance "small": the posterior's; "large": that of q(z_t | z_s); "learned": the network gives v in as many more channels, and
             v = -1 .. 1 chooses between the two, by their logarithms
    Source   Ho et al. 2020; Nichol & Dhariwal 2021, equation 15
    """
    _options("ddpm", prediction, clip, threshold)
    option("ddpm", "variance", variance, ("small", "large", "learned"))
    added, small = _variances(steps)
    chosen = added if variance == "large" else small
    to_eps = steps.signal / steps.next_signal * steps.next_sigma.square() / steps.sigma
    ratio = torch.where(small > 0, added / small, 1.0).log() if variance == "learned" else None
    return Plan(*steps[:3], steps.next_signal, to_eps, _silent(chosen.sqrt()), ratio, prediction=prediction, clip=clip,
                threshold=threshold, guided="mean")


def ddim(steps, *, prediction="eps", eta=0.0, clip=None, threshold=None, rederive=True):
    """The step of Song et al. 2021: eta = 0 draws no noise, eta = 1 as much as `ddpm` of the small variance."""
    _options("ddim", prediction, clip, threshold)
    if not 0 <= eta <= 1:
        fail("ddim", f"eta wants a value in [0, 1], got {eta}")
    std = eta * _variances(steps)[1].sqrt()
    to_eps = (steps.next_sigma.square() - std.square()).clamp(min=0).sqrt()
    return Plan(*steps[:3], steps.next_signal, to_eps, _silent(std) if eta else None, prediction=prediction, clip=clip,
                threshold=threshold, rederive=rederive)


def euler_maruyama(sde, count, *, last=1e-3, prediction="eps", clip=None):
    """`count` steps of the reverse SDE from t = 1 to `last`, by Euler's method."""
    t = sde.times(count, last)
    g = sde.diffusion(t)
    return _reverse(sde, count, t, 1 - sde.drift(t) / count, g.square() / count, g / count**0.5, prediction, clip)


def reverse_diffusion(sde, count, *, last=1e-3, prediction="eps", clip=None, flow=False):
    """The SDE's own discretization run backwards; flow: the probability flow's, half the score and no noise."""
    t = sde.times(count, last)
    f, G = sde.discretize(t, count)
    return _reverse(sde, count, t, 1 - f, G.square() / (1 + flow), None if flow else G, prediction, clip)


def ancestral(sde, count, *, last=1e-3, prediction="eps", clip=None):
    """Ancestral sampling of VE's and VP's discretizations.

    Source   Song et al. 2021 (score SDEs), appendix F
    """
    t = sde.times(count, last)
    if isinstance(sde, VE):
        sigma, before = sde.adjacent(t, count)
        added = sigma.square() - before.square()
        return _reverse(sde, count, t, torch.ones_like(t), added, before * added.sqrt() / sigma, prediction, clip)
    if not isinstance(sde, VP) or isinstance(sde, SubVP):
        fail("ancestral", f"sde wants a VE or a VP, got {type(sde).__name__}")
    beta = 1 - sde.trust(t, count)
    return _reverse(sde, count, t, (1 - beta).rsqrt(), beta * (1 - beta).rsqrt(), beta.sqrt(), prediction, clip)


def _reverse(sde, count, t, keep, of_score, of_noise, prediction, clip):
    """z' = keep z + of_score score + of_noise noise, in terms of x0 and eps = -sigma score."""
    _options("sampler", prediction, clip, None, ("eps", "x0", "v", "score"))
    signal, sigma = sde.marginal(t)
    to_x0, to_eps = keep * signal, keep * sigma - of_score / sigma
    if prediction == "score":  # of z itself: through x0 = z + sigma^2 score, terms of the size of sigma^2 would cancel
        if clip is not None:
            fail("sampler", "clip wants a prediction of eps, x0 or v, got 'score'")
        to_x0, to_eps = keep, of_score
    return Plan(sde.told(t), signal, sigma, to_x0, to_eps, None if of_noise is None else _silent(of_noise), None, sde.trust(t, count),
                prediction, clip)


def _options(op, prediction, clip, threshold, predictions=("eps", "x0", "v")):
    option(op, "prediction", prediction, predictions)
    if clip is not None and threshold is not None:
        fail(op, f"threshold wants clip to be None, got {clip}")


def _variances(steps):
    """(of q(z_t | z_s), of q(z_s | z_t, x0))."""
    ratio = steps.signal / steps.next_signal
    added = (steps.sigma.square() - (ratio * steps.next_sigma).square()).clamp(min=0)
    return added, added * (steps.next_sigma / steps.sigma).square()


def _silent(std):
    """No noise in the last step."""
    return torch.cat([std[:-1], torch.zeros_like(std[-1:])])
