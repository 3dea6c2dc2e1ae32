"""How much signal is left at which time: beta tables for discrete processes, gamma(t) = signal^2 for continuous ones."""

import math

import torch

from ..core.check import fail, integers

_LEAST = 1e-9  # no schedule here gives less signal than this


def linear_betas(steps, start=1e-4, end=0.02):
    """The betas of Ho et al. 2020, equally spaced and scaled by 1000 / steps: float64 (steps,)."""
    (steps,) = integers("linear_betas", "steps", steps)
    scale = 1000 / steps
    return torch.linspace(start * scale, end * scale, steps, dtype=torch.float64)


def cosine_betas(steps, offset=0.008, most=0.999):
    """1 - f((i + 1) / steps) / f(i / steps), at most `most`; f(u) = cos^2(pi/2 (u + offset) / (1 + offset)): float64 (steps,).

    Source   Nichol & Dhariwal 2021, equation 17
    """
    (steps,) = integers("cosine_betas", "steps", steps)
    u = torch.arange(steps + 1, dtype=torch.float64) / steps
    f = torch.cos((u + offset) / (1 + offset) * (math.pi / 2)).square()
    return (1 - f[1:] / f[:-1]).clamp(max=most)


def simple_linear_gamma(t):
    """gamma = 1 - t."""
    return (1 - t).clamp(_LEAST, 1)


def simple_cosine_gamma(t, offset=2e-4, stretch=2.5e-4):
    """gamma = cos^2(pi/2 (t + offset) / (1 + stretch)): no arguments to tune, never quite 0 or 1."""
    return torch.cos((t + offset) / (1 + stretch) * (math.pi / 2)).square().clamp(_LEAST, 1)


def cosine_gamma(t, start=0.0, end=1.0, tau=1.0):
    """gamma by f(u) = cos(pi/2 u)^(2 tau), from f(start) at t = 0 to f(end) at t = 1, stretched to [0, 1].

    Source   Chen 2023, "On the importance of noise scheduling", algorithm 1
    """
    return _between(lambda u: torch.cos(u * (math.pi / 2)) ** (2 * tau), t, start, end)


def sigmoid_gamma(t, start=-3.0, end=3.0, tau=1.0):
    """gamma by f(u) = sigmoid(-u / tau), from f(start) at t = 0 to f(end) at t = 1, stretched to [0, 1].

    Source   Jabri et al. 2023; Chen 2023, algorithm 1
    """
    return _between(lambda u: torch.sigmoid(-u / tau), t, start, end)


def _between(f, t, start, end):
    first, last = (f(torch.as_tensor(x, dtype=torch.float64)).to(t) for x in (start, end))
    return ((f(t * (end - start) + start) - last) / (first - last)).clamp(_LEAST, 1)


def spaced(steps, counts):
    """Which of `steps` timesteps a shorter chain keeps, ascending int64.

    counts   an int, or one int per section of equal length: so many steps equally spaced from the first to the last of each;
             "ddim50": 50 steps, a whole stride apart, from 0
    Source   Nichol & Dhariwal 2021, section 4
    """
    (steps,) = integers("spaced", "steps", steps)
    if isinstance(counts, str):
        wanted = int(counts.removeprefix("ddim")) if counts.startswith("ddim") and counts[4:].isdigit() else 0
        for stride in range(1, steps + 1):
            if len(range(0, steps, stride)) == wanted:
                return torch.arange(0, steps, stride)
        fail("spaced", f"counts wants 'ddimN' with N reached by a whole stride of {steps} steps, got {counts!r}")
    counts = integers("spaced", "counts", tuple(counts) if isinstance(counts, list) else counts, least=0)
    kept, first = [], 0
    for i, count in enumerate(counts):
        size = steps // len(counts) + (i < steps % len(counts))
        if not 0 <= count <= size:
            fail("spaced", f"counts wants at most {size} of a section of {size} steps, got {count}")
        stride, position = (size - 1) / (count - 1) if count > 1 else 1.0, 0.0
        for _ in range(count):  # added up, not multiplied: halves then round as in the original, and old sample runs can be repeated
            kept.append(first + round(position))
            position += stride
        first += size
    return torch.tensor(kept, dtype=torch.int64)
