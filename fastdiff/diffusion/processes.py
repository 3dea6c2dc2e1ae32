"""Gaussian processes z_t = signal(t) x0 + sigma(t) eps: in discrete steps, by a schedule gamma(t), and the three score SDEs."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from ..core.check import fail, integers, option, per_sample, tensor
from ..ops import add_noise, denoise_step
from .schedules import simple_cosine_gamma, spaced


def wide(x):
    """The dtype of coefficients beside x."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32


class Steps(NamedTuple):
    """What a sampler visits, in order, float64 (S,): what the denoiser is told, the level it starts from, the level it goes to."""

    time: torch.Tensor
    signal: torch.Tensor
    sigma: torch.Tensor
    next_signal: torch.Tensor
    next_sigma: torch.Tensor


class Process:
    """What every process here can do, given marginal(t) -> (signal, sigma) in float64, and told(t), what a denoiser is told of t."""

    def diffuse(self, x, noise, t):
        """z_t = signal x + sigma noise at times t (B,)."""
        return add_noise(x, noise, *self._scales(x, t))

    def target(self, x, noise, t, prediction):
        """What a network is trained to give for z_t: "eps" the noise, "x0" the data, "v" signal eps - sigma x0, "score" -eps / sigma."""
        if option("target", "prediction", prediction, ("eps", "x0", "v", "score")) in ("eps", "x0"):
            return noise if prediction == "eps" else x
        signal, sigma = self._scales(x, t)
        return add_noise(noise, x, signal, -sigma) if prediction == "v" else add_noise(noise, x, -1 / sigma, torch.zeros_like(sigma))

    def x0_and_eps(self, z, pred, t, *, prediction="eps", clip=None):
        """(x0, eps) that a prediction at times t (B,) means, eps recomputed from x0 where `clip` bounds it."""
        scales = self._scales(z, t)
        return tuple(denoise_step(z, pred, *scales, *weights, prediction=prediction, clip=clip) for weights in ((1.0, 0.0), (0.0, 1.0)))

    def _scales(self, x, t):
        per_sample("process", x, t=t)
        return tuple(s.to(x.device, wide(x)) for s in self.marginal(t))


@dataclass(frozen=True, eq=False)
class Discrete(Process):
    """z_t = sqrt(gamma_t) x0 + sqrt(1 - gamma_t) eps for t = 0 .. T - 1, gamma_t = (1 - beta_0) ... (1 - beta_t).

    betas    (T,), kept in float64 on their device: training on a GPU reads them there
    time     what a denoiser is told at each step (T,); None: the step's number
    Source   Ho et al. 2020; Nichol & Dhariwal 2021
    """

    betas: torch.Tensor
    time: torch.Tensor | None = None
    gamma: torch.Tensor = field(init=False, repr=False)

    def __post_init__(self):
        if tensor("Discrete", "betas", self.betas).dim() != 1 or not ((self.betas > 0) & (self.betas <= 1)).all():
            fail("Discrete", "betas wants the shape (T,) and values in (0, 1]")
        object.__setattr__(self, "betas", self.betas.double())
        object.__setattr__(self, "time", torch.arange(len(self.betas), device=self.betas.device) if self.time is None else self.time)
        object.__setattr__(self, "gamma", (1 - self.betas).cumprod(0))

    def marginal(self, t):
        gamma = self.gamma.to(t.device)[t]
        return gamma.sqrt(), (1 - gamma).sqrt()

    def told(self, t):
        return self.time.to(t.device)[t]

    def respaced(self, counts):
        """The shorter chain through some of the steps: `counts` as in `spaced`, or the steps themselves, ascending."""
        kept = counts if isinstance(counts, torch.Tensor) else spaced(len(self.betas), counts)
        gamma = self.gamma[kept]
        return Discrete(1 - gamma / torch.cat([gamma.new_ones(1), gamma[:-1]]), self.time[kept])

    def at(self, t):
        """The steps from t to t - 1 for each of t (B,), from 0 to the data; on t's device."""
        return self._between(t, self._before.to(t.device)[t])

    def steps(self, *, inverse=False):
        """From noise to data; inverse: from each level to the noisier one after it, as DDIM encodes data."""
        t = torch.arange(len(self.gamma), device=self.gamma.device)
        return self._between(t, torch.cat([self.gamma[1:], self.gamma.new_zeros(1)])) if inverse else self.at(t.flip(0))

    @property
    def _before(self):
        return torch.cat([self.gamma.new_ones(1), self.gamma[:-1]])

    def _between(self, t, gamma):
        return Steps(self.told(t), *self.marginal(t), gamma.sqrt(), (1 - gamma).sqrt())

    def between(self, t, u):
        """A gamma between those of the steps t - 1 and t, by u (B,) in [0, 1]: the training levels of networks told gamma (Palette)."""
        before = self._before.to(t.device)[t]
        return before + (self.gamma.to(t.device)[t] - before) * u


@dataclass(frozen=True)
class Continuous(Process):
    """z_t = sqrt(gamma(t)) x0 + sqrt(1 - gamma(t)) eps for t in [0, 1].

    gamma    a schedule of `schedules`, or any function of a tensor; keep arguments by functools.partial
    tells    what a denoiser is told: "gamma", "t", or "logsnr" = ln(gamma / (1 - gamma))
    Source   Chen et al. 2023 (analog bits), section 2
    """

    gamma: Callable = simple_cosine_gamma
    tells: str = "gamma"

    def marginal(self, t):
        gamma = self.gamma(t.double())
        return gamma.sqrt(), (1 - gamma).sqrt()

    def told(self, t):
        gamma = self.gamma(t.double())
        option("Continuous", "tells", self.tells, ("gamma", "t", "logsnr"))
        return dict(gamma=gamma, t=t.double(), logsnr=torch.logit(gamma))[self.tells]

    def steps(self, count, *, shift=0.0):
        """`count` equal steps from t = 1 to 0. shift: how many steps further each one aims, ending at 0 (asymmetric time intervals)."""
        (count,) = integers("steps", "count", count)
        if not shift >= 0:
            fail("steps", f"shift wants a value of at least 0, got {shift}")
        k = torch.arange(count, dtype=torch.float64)
        t, s = 1 - k / count, (1 - (k + 1 + shift) / count).clamp(min=0)
        return Steps(self.told(t), *self.marginal(t), *self.marginal(s))


@dataclass(frozen=True)
class _SDE(Process):
    """dz = drift(t) z dt + diffusion(t) dw, t in [0, 1]; discretize(t, n) is one of n steps of it: z + f z + G noise, as (f, G)."""

    def discretize(self, t, n):
        return self.drift(t) / n, self.diffusion(t) / math.sqrt(n)

    def index(self, t, n):
        return (t.double() * (n - 1)).long()

    def trust(self, t, n):
        """The factor of a Langevin step's size: 1 - beta of the step where there is one."""
        return torch.ones_like(t, dtype=torch.float64)

    def times(self, n, last):
        (n,) = integers("times", "n", n)
        if not 0 < last <= 1:
            fail("times", f"last wants a value in (0, 1], got {last}")
        return torch.linspace(1, last, n, dtype=torch.float64)


@dataclass(frozen=True)
class VE(_SDE):
    """Variance exploding: z_t = x0 + sigma(t) eps, sigma(t) = low (high / low)^t. Units: low, high in units of the data."""

    low: float = 0.01
    high: float = 50.0

    def marginal(self, t):
        sigma = self.low * (self.high / self.low) ** t.double()
        return torch.ones_like(sigma), sigma

    def told(self, t):
        return self.marginal(t)[1]

    def drift(self, t):
        return torch.zeros_like(t, dtype=torch.float64)

    def diffusion(self, t):
        return self.marginal(t)[1] * math.sqrt(2 * math.log(self.high / self.low))

    def sigmas(self, n):
        """n levels, equally spaced in their logarithms, from low to high."""
        return torch.linspace(math.log(self.low), math.log(self.high), n, dtype=torch.float64).exp()

    def adjacent(self, t, n):
        """sigma of the step of time t and of the one before it, 0 before the first."""
        levels, i = self.sigmas(n).to(t.device), self.index(t, n)
        return levels[i], torch.where(i > 0, levels[i - 1], 0.0)

    def discretize(self, t, n):
        sigma, before = self.adjacent(t, n)
        return torch.zeros_like(sigma), (sigma.square() - before.square()).sqrt()


@dataclass(frozen=True)
class VP(_SDE):
    """Variance preserving: z_t = exp(c) x0 + sqrt(1 - exp(2 c)) eps, c = -(t^2 (high - low) / 4 + t low / 2).

    beta(t) = low + t (high - low).
    """

    low: float = 0.1
    high: float = 20.0

    def _log_signal(self, t):
        t = t.double()
        return -(t.square() * (self.high - self.low) / 4 + t * self.low / 2)

    def marginal(self, t):
        log_signal = self._log_signal(t)
        return log_signal.exp(), (-torch.expm1(2 * log_signal)).sqrt()

    def told(self, t):
        return t.double() * 999

    def beta(self, t):
        return self.low + t.double() * (self.high - self.low)

    def drift(self, t):
        return -self.beta(t) / 2

    def diffusion(self, t):
        return self.beta(t).sqrt()

    def betas(self, n):
        """Those of n discrete steps."""
        return torch.linspace(self.low / n, self.high / n, n, dtype=torch.float64)

    def discretize(self, t, n):
        beta = self.betas(n).to(t.device)[self.index(t, n)]
        return (1 - beta).sqrt() - 1, beta.sqrt()

    def trust(self, t, n):
        return 1 - self.betas(n).to(t.device)[self.index(t, n)]


@dataclass(frozen=True)
class SubVP(VP):
    """VP's signal with a smaller noise: z_t = exp(c) x0 + (1 - exp(2 c)) eps."""

    def marginal(self, t):
        log_signal = self._log_signal(t)
        return log_signal.exp(), -torch.expm1(2 * log_signal)

    def diffusion(self, t):
        return (self.beta(t) * -torch.expm1(4 * self._log_signal(t))).sqrt()

    discretize, trust = _SDE.discretize, _SDE.trust
