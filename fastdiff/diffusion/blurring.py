"""Blurring diffusion (Hoogeboom & Salimans 2023): noise is added and the image blurred, as one Gaussian process per frequency.

Inverse heat dissipation (Rissanen et al. 2023): the image is blurred by levels, and a network undoes one level at a time.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch

from ..core.check import fail, integers, option, per_sample, tensor
from ..ops import blur, blur_denoise, blur_diffuse
from .processes import wide
from .sampling import normal, shown, source


@dataclass(frozen=True)
class BlurringDiffusion:
    """z_t = signal(t) blur(x, width(t), floor) + sigma(t) eps, t in [0, 1]; in discrete time t = 1/T, 2/T, ..., 1.

    With max_width=0 it is a variance-preserving Gaussian diffusion in pixels.

    Units    logsnr: natural logarithm of signal^2 / sigma^2 at t = 1 (min) and t = 0 (max); max_width: pixels, at t = 1
    Source   Hoogeboom & Salimans 2023, section 4 and appendix A
    """

    logsnr_min: float = -10.0
    logsnr_max: float = 10.0
    max_width: float = 20.0
    floor: float = 1e-3

    def scales(self, t):
        """(signal, sigma, width) at times t, in t's dtype: signal^2 + sigma^2 = 1, logsnr = -2 ln tan(angle)."""
        first, last = (math.atan(math.exp(-logsnr / 2)) for logsnr in (self.logsnr_max, self.logsnr_min))
        angle = first + (last - first) * t
        return torch.cos(angle), torch.sin(angle), self.max_width * torch.sin(t * (math.pi / 2)).square()

    def diffuse(self, x, noise, t):
        """z_t for images x, noise (B, C, h, w) and times t (B,)."""
        per_sample("diffuse", x, t=t)
        signal, sigma, width = (s.to(wide(x)) for s in self.scales(t))
        return blur_diffuse(x, noise, signal, sigma, width, floor=self.floor)

    def training_pair(self, x, t=None, noise=None, *, steps=None, generator=None):
        """(z_t, t, eps) for images x (B, C, h, w): a network is trained to minimise |eps - net(z_t, t)|^2.

        Times (B,) that are not given are uniform: on [0, 1], or on 1/steps, 2/steps, ..., 1; noise that is not given is normal.
        """
        tensor("training_pair", "x", x)
        if steps is not None:
            (steps,) = integers("training_pair", "steps", steps)
        if t is None:
            draw = torch.rand(x.shape[:1], dtype=wide(x), device=source(x, generator), generator=generator).to(x.device)
            t = draw if steps is None else (1 + torch.floor(draw * steps).clamp(max=steps - 1)) / steps
        noise = normal(x, generator) if noise is None else noise
        return self.diffuse(x, noise, t), t, noise

    def alpha(self, t, grid):
        """The signal's scale at times t (B,) for every frequency of an h x w grid: float64 (B, 1, h, w)."""
        signal, _, width = (s.view(-1, 1, 1, 1) for s in self.scales(t.double()))
        squares = [(torch.arange(n, device=t.device, dtype=torch.float64) * (math.pi / max(n, 1))).square() for n in grid]
        decay = torch.exp(-(squares[0].unsqueeze(1) + squares[1]) * width.square() / 2)
        return signal * ((1 - self.floor) * decay + self.floor)

    def gains(self, t, s, grid, *, prediction="eps"):
        """(gain_z, gain_prediction, gain_noise) of `blur_denoise` for the step from times t to times s <= t: float64 (B, 1, h, w).

        With r = alpha_t / alpha_s and u = sigma_t^2 - r^2 sigma_s^2, the variance of z_t given z_s, the posterior of z_s given z_t and x
        has the variance sigma_s^2 u / sigma_t^2 and the mean (r sigma_s^2 z + alpha_s u x) / sigma_t^2 = (z - u eps / sigma_t) / r.
        """
        alpha_t, alpha_s = self.alpha(t, grid), self.alpha(s, grid)
        (_, sigma_t, _), (_, sigma_s, _) = (tuple(x.view(-1, 1, 1, 1) for x in self.scales(time.double())) for time in (t, s))
        ratio = alpha_t / alpha_s
        added = (sigma_t.square() - (ratio * sigma_s).square()).clamp(min=0)
        noise = sigma_s * added.sqrt() / sigma_t
        if option("gains", "prediction", prediction, ("eps", "x")) == "x":
            return ratio * (sigma_s / sigma_t).square(), alpha_s * added / sigma_t.square(), noise
        return 1 / ratio, -added / (ratio * sigma_t), noise

    def denoise(self, z, predicted, noise, t, s, *, prediction="eps"):
        """A draw of z_s given z_t and the predicted eps or x; `noise` is standard normal, per frequency. Times t >= s (B,).

        One inverse transform makes mean and noise, and colours the noise by frequency.
        """
        per_sample("denoise", z, t=t, s=s)
        return self._step(*(x.to(wide(z)) for x in (z, predicted, noise)), t, s, prediction).to(z.dtype)

    def _step(self, z, predicted, noise, t, s, prediction):
        """In float32 or float64: in half precision the gains of small steps would round to 1."""
        return blur_denoise(z, predicted, noise, *(g.to(z.dtype) for g in self.gains(t, s, z.shape[2:], prediction=prediction)))

    @torch.no_grad()
    def sample(self, denoiser, z, steps, *, prediction="eps", generator=None, progress=False):
        """Images from z (B, C, h, w), standard normal noise: `steps` equal steps from t = 1 to 0.

        steps may also be the times themselves, 1-D and falling. denoiser(z, t) predicts eps (or x) from z and times (B,). Between its calls
        z is kept in float32 where it came in half precision. generator, progress: as in `diffusion.sample`.
        """
        tensor("sample", "z", z)
        if isinstance(steps, torch.Tensor):
            if steps.dim() != 1 or len(steps) < 2 or not ((steps >= 0) & (steps <= 1)).all() or not (steps.diff() < 0).all():
                fail("sample", f"steps wants falling times in [0, 1], at least two, got {steps}")
            times = steps.double()
        else:
            (steps,) = integers("sample", "steps", steps)
            times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        dtype, z = z.dtype, z.to(wide(z))
        for t, s in shown(pairwise(times.to(z.device).unsqueeze(1)), len(times) - 1, progress):
            predicted = denoiser(z.to(dtype), t.to(z.dtype).expand(z.shape[0])).to(z.dtype)
            z = self._step(z, predicted, normal(z, generator), t, s, prediction)
        return z.to(dtype)


@dataclass(frozen=True)
class InverseHeat:
    """Levels k = 0 to K of blur, u_k = blur(x, width_k), and a network that finds u_{k-1} from u_k with a little noise.

    width_0 = 0, and width_1 to width_K are in equal ratios from min_width to max_width.

    Units    widths: pixels; noise and the sampler's delta: the image's units, for images in [0, 1]
    Source   Rissanen, Heinonen & Solin 2023, section 3 and appendix A
    """

    levels: int = 200
    max_width: float = 24.0
    min_width: float = 0.5
    noise: float = 0.01

    def __post_init__(self):
        integers("InverseHeat", "levels", self.levels)
        if not 0 < self.min_width <= self.max_width:
            fail("InverseHeat", f"min_width wants more than 0 and at most max_width = {self.max_width}, got {self.min_width}")

    def widths(self, device=None):
        """The blur's width at every level: float64 (K + 1,)."""
        logs = torch.linspace(math.log(self.min_width), math.log(self.max_width), self.levels, dtype=torch.float64)
        return torch.cat((logs.new_zeros(1), logs.exp())).to(device)

    def _width(self, op, k, x, least=0):
        per_sample(op, x, k=k)
        if k.dtype is not torch.int64:
            fail(op, f"k wants int64, got {k.dtype}")
        if not k.is_cuda and k.numel() and not (least <= k.min() and k.max() <= self.levels):
            fail(op, f"k wants levels in [{least}, {self.levels}], got [{k.min()}, {k.max()}]")
        return self.widths(x.device)[k - least].to(wide(x))

    def blur(self, x, k):
        """u_k for images x (B, C, h, w) and levels k (B,), int64."""
        return blur(x, self._width("blur", k, x))

    def training_pair(self, x, k=None, noise=None, *, generator=None):
        """(y, k, residual) for images x: y = u_k + self.noise n, residual = u_{k-1} - y.

        A network is trained to minimise |residual - net(y, k)|^2, summed over the pixels and averaged over the samples. Levels (B,) that
        are not given are uniform on 1 to K - 1, as in the authors' program (K = 1: on 1); noise n that is not given is normal.
        """
        tensor("training_pair", "x", x)
        if k is None:
            k = torch.randint(1, max(2, self.levels), x.shape[:1], device=source(x, generator), generator=generator).to(x.device)
        less = self._width("training_pair", k, x, least=1)
        n = normal(x, generator) if noise is None else noise
        one = torch.ones_like(less)
        y = blur_diffuse(x, n, one, self.noise * one, self._width("training_pair", k, x), floor=0.0)
        return y, k, blur(x, less) - y

    @torch.no_grad()
    def sample(self, denoiser, u, *, delta=None, generator=None, progress=False):
        """Images from blurred images u = u_K (B, C, h, w): K times u <- u + denoiser(u, k) + delta n, the last time without noise.

        denoiser(u, k) predicts the residual from u and levels k (B,), int64. delta is 1.25 self.noise unless given. Between its calls u is
        kept in float32 where it came in half precision. generator, progress: as in `diffusion.sample`.
        """
        tensor("sample", "u", u)
        delta = 1.25 * self.noise if delta is None else delta
        dtype, u = u.dtype, u.to(wide(u))
        for k in shown(range(self.levels, 0, -1), self.levels, progress):
            u = u + denoiser(u.to(dtype), torch.full(u.shape[:1], k, dtype=torch.int64, device=u.device))
            if k > 1:
                u = u + delta * normal(u, generator)
        return u.to(dtype)
