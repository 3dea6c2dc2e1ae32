"""What is peculiar to attention."""

import pytest
import torch

import fastdiff
from fastdiff import ops


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_heads_of_no_width(backend):
    """Scores are all 0: the log-sum-exp is log N, and there is nothing else to compute."""
    q, k = (torch.randn(2, 1, n, 0, requires_grad=True) for n in (3, 5))
    with fastdiff.use_backend(backend):
        out, lse = ops.attention_with_lse(q, k, k)
        lse.sum().backward()
        assert ops.attention(q.detach(), k.detach(), k.detach()).shape == out.shape == q.grad.shape == (2, 1, 3, 0)
    torch.testing.assert_close(lse, torch.full_like(lse, 5.0).log())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_over_an_optical_flow_field(dtype):
    """182,528 keys, Perceiver IO's longest read: no further off than plain PyTorch."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, n, 32, dtype=dtype) for n in (7, 182528, 182528))
    v += 3.0
    out, lse = ops.attention_with_lse(q, k, v)
    scores = q.double() @ k.double().transpose(-1, -2) * 32**-0.5
    exact = torch.softmax(scores, -1) @ v.double()
    torch.testing.assert_close(lse.double(), torch.logsumexp(scores, -1), rtol=0, atol=2e-6)
    plain = torch.softmax((q * 32**-0.5) @ k.transpose(-1, -2), -1) @ v
    assert (out.double() - exact).abs().max() <= (plain.double() - exact).abs().max()


def test_gradients_over_a_long_side():
    """Both long sides, where partial sums are added up: read and write, float32 against float64."""
    torch.manual_seed(0)
    for M, N in ((5, 50176), (50176, 5)):
        exact = [torch.randn(1, 1, n, 24, dtype=torch.float64, requires_grad=True) for n in (M, N, N)]
        leaves = [x.detach().float().requires_grad_() for x in exact]
        wanted = torch.autograd.grad(ops.attention(*exact).square().sum(), exact)
        for ours, theirs in zip(torch.autograd.grad(ops.attention(*leaves).square().sum(), leaves), wanted, strict=True):
            assert (ours.double() - theirs).abs().max() <= 2e-6 * max(1.0, theirs.abs().max().item())
