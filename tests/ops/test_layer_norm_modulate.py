"""What is peculiar to the norms of a DiT block: chunks of one projection, means far from zero, the boundary of two sublayers."""

import pytest
import torch
import torch.nn.functional as F

from fastdiff.ops import gate_residual, gate_residual_norm_modulate, layer_norm_modulate


def _block(B=2, N=40, D=96, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    made = lambda *shape: torch.randn(shape, generator=generator).to(dtype)
    return made(B, N, D), made(B, N, D), made(B, 6 * D)


def test_chunks_of_one_projection():
    """A DiT block's six vectors are slices with the stride of the whole; gradients reach the projection."""
    x, y, projection = _block()
    projection.requires_grad_()
    shift, scale, gate, *_ = projection.chunk(6, 1)
    assert shift.stride(0) == 6 * 96
    out, h = gate_residual_norm_modulate(x, y, gate, shift, scale)
    expected = x + gate[:, None] * y
    normal = F.layer_norm(expected, (96,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(h, normal, atol=2e-6, rtol=1e-5)
    ours, = torch.autograd.grad(h.square().sum() + out.sum(), projection)
    plain, = torch.autograd.grad(normal.square().sum() + expected.sum(), projection)
    torch.testing.assert_close(ours, plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_the_boundary_is_its_two_halves(dtype):
    x, y, projection = _block(dtype=dtype)
    shift, scale, gate, *_ = projection.chunk(6, 1)
    out, h = gate_residual_norm_modulate(x, y, gate, shift, scale)
    assert torch.equal(out, gate_residual(x, y, gate))
    torch.testing.assert_close(h, layer_norm_modulate(out, shift, scale), rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=2e-6)


@pytest.mark.parametrize("D", (1, 7, 96, 1152, 5000))
@pytest.mark.parametrize("mean", (1e3, -1e5))
def test_mean_far_above_deviation(D, mean):
    """E[x^2] - mean^2 would have no right digit here."""
    x = (torch.randn(2, 3, D, generator=torch.Generator().manual_seed(D), dtype=torch.float64) + mean).float()
    exact = F.layer_norm(x.double(), (D,), eps=1e-6)
    assert (layer_norm_modulate(x) - exact).abs().max() < 2e-6 * exact.abs().max().clamp(min=1)


@pytest.mark.parametrize("where", (0, 3, 500, 1136))
def test_first_elements_are_no_measure_of_the_mean(where):
    """The kernels guess a row's mean from its first elements."""
    x = torch.randn(1, 4, 1152, generator=torch.Generator().manual_seed(where))
    x[..., where:where + 16] += 1e4
    exact = F.layer_norm(x.double(), (1152,), eps=1e-6)
    assert (layer_norm_modulate(x) - exact).abs().max() < 1e-6 * exact.abs().max()


def test_large_results():
    """Results that are stored past the caches have the bits of small ones."""
    x, y, projection = _block(B=9, N=512, D=1152)
    shift, scale, gate, *_ = projection.chunk(6, 1)
    out, h = gate_residual_norm_modulate(x, y, gate, shift, scale)
    part = gate_residual_norm_modulate(x[4:5], y[4:5], gate[4:5], shift[4:5], scale[4:5])
    assert torch.equal(out[4:5], part[0]) and torch.equal(h[4:5], part[1])


def test_refusals():
    x, y, projection = _block()
    with pytest.raises(ValueError, match=r"layer_norm_modulate: scale wants \(B, D\) or \(B, N, D\), got \(96,\)"):
        layer_norm_modulate(x, None, projection[0, :96])
    with pytest.raises(ValueError, match="gate_residual: gate has D = 95, but x has D = 96"):
        gate_residual(x, y, projection[:, :95])
    with pytest.raises(ValueError, match=r"weight wants torch\.float32 beside x of torch\.float32, got torch\.bfloat16"):
        layer_norm_modulate(x, weight=torch.ones(96).bfloat16())
    with pytest.raises(ValueError, match="eps wants a finite number, at least 0"):
        layer_norm_modulate(x, eps=-1.0)
