"""Blurring diffusion (Hoogeboom & Salimans 2023): noise is added and the image blurred, as one Gaussian process per frequency."""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch

from ..core.check import fail, tensor
from ..ops import blur_denoise, blur_diffuse


def _wide(x):
    return torch.float64 if x.dtype is torch.float64 else torch.float32


@dataclass(frozen=True)
class BlurringDiffusion:
    """z_t = signal(t) blur(x, width(t), floor) + sigma(t) eps, t in [0, 1].

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
        """z_t for images x, noise (B, C, h, w) and times t (B,); a network is trained to tell `noise` from z_t and t."""
        signal, sigma, width = (s.to(_wide(x)) for s in self.scales(self._times("diffuse", "t", t, x)))
        return blur_diffuse(x, noise, signal, sigma, width, floor=self.floor)

    def alpha(self, t, grid):
        """The signal's scale at times t (B,) for every frequency of an h x w grid: float64 (B, 1, h, w)."""
        signal, _, width = (s.view(-1, 1, 1, 1) for s in self.scales(t.double()))
        squares = [(torch.arange(n, device=t.device, dtype=torch.float64) * (math.pi / max(n, 1))).square() for n in grid]
        decay = torch.exp(-(squares[0].unsqueeze(1) + squares[1]) * width.square() / 2)
        return signal * ((1 - self.floor) * decay + self.floor)

    def gains(self, t, s, grid):
        """(gain_z, gain_eps, gain_noise) of `blur_denoise` for the step from times t to times s <= t: float64 (B, 1, h, w).

        With r = alpha_t / alpha_s and u = sigma_t^2 - r^2 sigma_s^2, the variance of z_t given z_s, the posterior has the variance
        sigma_s^2 u / sigma_t^2 and the mean (z - u eps / sigma_t) / r: two coefficients of z add up to 1 / r.
        """
        ratio = self.alpha(t, grid) / self.alpha(s, grid)
        (_, sigma_t, _), (_, sigma_s, _) = (tuple(x.view(-1, 1, 1, 1) for x in self.scales(time.double())) for time in (t, s))
        added = (sigma_t.square() - (ratio * sigma_s).square()).clamp(min=0)
        return 1 / ratio, -added / (ratio * sigma_t), sigma_s * added.sqrt() / sigma_t

    def denoise(self, z, eps, noise, t, s):
        """A draw of z_s given z_t and the predicted eps; `noise` is standard normal, per frequency. Times t >= s (B,)."""
        t, s = self._times("denoise", "t", t, z), self._times("denoise", "s", s, z)
        return blur_denoise(z, eps, noise, *(g.to(z.dtype) for g in self.gains(t, s, z.shape[2:])))

    def sample(self, denoiser, z, steps, *, generator=None):
        """Images from z (B, C, h, w), standard normal noise: `steps` equal steps from t = 1 to 0, with eps = denoiser(z, t)."""
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            fail("sample", f"steps wants an int of at least 1, got {steps!r}")
        times = torch.linspace(1, 0, steps + 1, dtype=_wide(z), device=z.device).unsqueeze(1).expand(-1, z.shape[0])
        for t, s in pairwise(times):
            noise = torch.randn(z.shape, dtype=z.dtype, device=z.device, generator=generator)
            z = self.denoise(z, denoiser(z, t), noise, t, s)
        return z

    @staticmethod
    def _times(op, name, t, x):
        if tensor(op, name, t).shape != tensor(op, "x", x).shape[:1]:
            fail(op, f"{name} wants the shape (B,) = ({x.shape[0]},), got {tuple(t.shape)}")
        return t
