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
