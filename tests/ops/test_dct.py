"""What the property suite does not draw: long lengths of every kind of splitting, and identities between the frequency ops."""

import pytest
import torch

from fastdiff import ops
from fastdiff.core.backend import use_backend

LENGTHS = (1, 2, 3, 16, 20, 28, 31, 32, 40, 48, 64, 97, 100, 105, 128, 217, 256, 300, 434, 512, 1000, 1155)


@pytest.mark.parametrize("inverse", (False, True), ids=("dct", "idct"))
@pytest.mark.parametrize("n", LENGTHS)
def test_length(n, inverse):
    """Within a few roundings of the exact transform, along either axis and along rows alone."""
    transform = ops.idct if inverse else ops.dct
    for shape, dims in (((2, n, 7), 2), ((1, 19, n), 2), ((70, n), 1)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(n))
        with use_backend("reference"):
            exact = transform(x.double(), dims=dims)
        # A product with a matrix of n columns adds up n roundings; splittings add up fewer.
        assert (transform(x, dims=dims) - exact).abs().max() < 1e-6 * (1 + n ** 0.5 / 8)
        assert (ops.idct(ops.dct(x, dims=dims), dims=dims) - x).abs().max() < 5e-6


def test_first_frequency_is_the_mean():
    x = torch.randn(2, 3, 8, 12)
    torch.testing.assert_close(ops.dct(x)[..., 0, 0], x.mean((2, 3)) * 96 ** 0.5)


def test_blurs_compose():
    """The heat equation: widths add in squares."""
    x, a, b = torch.randn(3, 2, 40, 33), torch.tensor([0.0, 1.0, 7.0]), torch.tensor([2.0, 0.5, 3.0])
    torch.testing.assert_close(ops.blur(ops.blur(x, a), b), ops.blur(x, (a.square() + b.square()).sqrt()), atol=2e-6, rtol=0)


def test_blur_keeps_mean_and_floor_keeps_detail():
    x = torch.randn(1, 1, 32, 32)
    blurred = ops.blur(x, torch.tensor([1e4]), floor=0.25)
    torch.testing.assert_close(blurred, 0.25 * x + 0.75 * x.mean().expand_as(x), atol=1e-6, rtol=1e-5)


def test_steps_are_their_transforms():
    z, eps, noise = torch.randn(3, 2, 3, 20, 24)
    gains = torch.randn(3, 20, 24)
    mixed = ops.idct(gains[0] * ops.dct(z) + gains[1] * ops.dct(eps) + gains[2] * noise)
    torch.testing.assert_close(ops.blur_denoise(z, eps, noise, *gains), mixed, atol=1e-5, rtol=1e-5)
    signal, sigma, width = torch.tensor([0.9, 0.2]), torch.tensor([0.1, 0.8]), torch.tensor([0.5, 4.0])
    diffused = signal.view(2, 1, 1, 1) * ops.blur(z, width, floor=1e-3) + sigma.view(2, 1, 1, 1) * noise
    torch.testing.assert_close(ops.blur_diffuse(z, noise, signal, sigma, width), diffused, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("n", [28, 64, 100, 217, 509, 768])
def test_as_exact_as_scipy(n):
    """float32 within twice scipy's own error, both ways."""
    scipy_fft = pytest.importorskip("scipy.fft")
    x = torch.randn(400, n, generator=torch.Generator().manual_seed(0))
    for ours, name in ((ops.dct, "dct"), (ops.idct, "idct")):
        theirs = getattr(scipy_fft, name)
        exact = theirs(x.double().numpy(), norm="ortho")
        error, allowed = (abs(y - exact).max() for y in (ours(x, dims=1).numpy(), theirs(x.numpy(), norm="ortho")))
        assert error <= 2 * allowed
