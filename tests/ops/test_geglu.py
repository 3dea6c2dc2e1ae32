"""What is peculiar to geglu: the whole range of the gate, and any rank."""

import pytest
import torch
import torch.nn.functional as F

from fastdiff.ops import geglu


@pytest.mark.parametrize("approximate", ("none", "tanh"))
def test_every_gate(approximate):
    """gelu and its slope from -40 to 40, against float64."""
    b = torch.linspace(-40, 40, 100_001).requires_grad_()
    y = geglu(torch.stack((torch.ones_like(b), b), 1), approximate=approximate)[:, 0]
    slope, = torch.autograd.grad(y.sum(), b)
    wide = b.detach().double().requires_grad_()
    exact = F.gelu(wide, approximate=approximate)
    exact_slope, = torch.autograd.grad(exact.sum(), wide)
    assert ((y - exact).abs() <= 2e-7 * (1 + exact.abs())).all()
    assert (slope - exact_slope).abs().max() < 5e-7


@pytest.mark.parametrize("approximate", ("none", "tanh"))
def test_ends(approximate):
    """float32's gelu of PyTorch overflows at the upper end."""
    b = torch.tensor([-3e38, -1e4, -0.0, 0.0, 1e4, 3e38, torch.inf, torch.nan])
    y = geglu(torch.stack((torch.ones_like(b), b), 1), approximate=approximate)[:, 0]
    torch.testing.assert_close(y, F.gelu(b.double(), approximate=approximate).float(), equal_nan=True)


def test_rank():
    x = torch.randn(3, 2, 4, 10, generator=torch.Generator().manual_seed(0))
    a, b = x.chunk(2, -1)
    torch.testing.assert_close(geglu(x), a * F.gelu(b))
    assert torch.equal(geglu(x)[1, 1, 2], geglu(x[1, 1, 2]))
    assert geglu(x.transpose(0, 2)).shape == (4, 2, 3, 5)
    with pytest.raises(ValueError, match=r"geglu: x wants an even last axis, got \(3, 5\)"):
        geglu(torch.ones(3, 5))
