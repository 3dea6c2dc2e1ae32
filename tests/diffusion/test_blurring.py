"""A blurring diffusion's process, posterior and sampler, in float64."""

import pytest
import torch

from fastdiff import ops
from fastdiff.diffusion import BlurringDiffusion

PROCESS = BlurringDiffusion()
GRID = (6, 9)


def _times(*values):
    return torch.tensor(values, dtype=torch.float64)


def _randn(*shape):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def test_schedule():
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    signal, sigma, width = PROCESS.scales(t)
    torch.testing.assert_close(signal.square() + sigma.square(), torch.ones_like(t))
    logsnr = 2 * (signal / sigma).log()
    assert logsnr[0] == pytest.approx(10) and logsnr[-1] == pytest.approx(-10) and (logsnr.diff() < 0).all()
    assert width[0] == 0 and width[-1] == pytest.approx(20) and (width.diff() > 0).all()


def test_forward_process_is_diagonal():
    x, noise, t = _randn(3, 2, *GRID), _randn(3, 2, *GRID), _times(0.05, 0.5, 0.95)
    _, sigma, _ = PROCESS.scales(t)
    meant = ops.idct(PROCESS.alpha(t, GRID) * ops.dct(x)) + sigma.view(-1, 1, 1, 1) * noise
    torch.testing.assert_close(PROCESS.diffuse(x, noise, t), meant)


def test_steps_compose_to_the_forward_process():
    """With the true eps, z_s has the mean alpha_s and the variance sigma_s^2 of the forward process at every frequency."""
    t, s = _times(0.2, 0.7, 1.0, 0.5), _times(0.1, 0.3, 0.99, 0.5)
    gain_z, gain_eps, gain_noise = PROCESS.gains(t, s, GRID)
    alpha_t, alpha_s = PROCESS.alpha(t, GRID), PROCESS.alpha(s, GRID)
    sigma_t, sigma_s = (PROCESS.scales(time)[1].view(-1, 1, 1, 1) for time in (t, s))
    torch.testing.assert_close(gain_z * alpha_t, alpha_s)
    of_eps = gain_z * sigma_t + gain_eps
    torch.testing.assert_close(of_eps.square() + gain_noise.square(), sigma_s.square().expand_as(alpha_s))


def test_posterior_is_bayes():
    """The mean and variance of z_s given z_t and x, as a product of two Gaussians."""
    t, s = _times(0.3, 0.8), _times(0.25, 0.4)
    z, eps, noise = _randn(2, 1, *GRID), _randn(2, 1, *GRID), _randn(2, 3, *GRID)[:, :1]
    alpha_t, alpha_s = PROCESS.alpha(t, GRID), PROCESS.alpha(s, GRID)
    sigma_t, sigma_s = (PROCESS.scales(time)[1].view(-1, 1, 1, 1) for time in (t, s))
    x = (ops.dct(z) - sigma_t * ops.dct(eps)) / alpha_t
    ratio = alpha_t / alpha_s
    added = sigma_t.square() - (ratio * sigma_s).square()
    variance = 1 / (1 / sigma_s.square() + ratio.square() / added)
    mean = variance * (ratio / added * ops.dct(z) + alpha_s / sigma_s.square() * x)
    torch.testing.assert_close(PROCESS.denoise(z, eps, noise, t, s), ops.idct(mean + variance.sqrt() * noise))


def test_sampler_finds_the_only_image():
    """Where the data are one image, the true eps is known, and a sample is that image and the noise of t = 0."""
    x = _randn(2, 3, *GRID)

    def denoiser(z, t):
        _, sigma, _ = PROCESS.scales(t)
        return (z - ops.idct(PROCESS.alpha(t, GRID) * ops.dct(x))) / sigma.view(-1, 1, 1, 1)

    found = PROCESS.sample(denoiser, _randn(2, 3, *GRID), 50, generator=torch.Generator().manual_seed(0))
    _, sigma, _ = PROCESS.scales(_times(0.0))
    assert (found - x).abs().max() < 6 * sigma.item()


def test_refusals():
    x = _randn(2, 3, *GRID)
    with pytest.raises(ValueError, match="t wants the shape"):
        PROCESS.diffuse(x, x, _times(0.5))
    with pytest.raises(ValueError, match="steps wants"):
        PROCESS.sample(lambda z, t: z, x, 0)
