"""Linear against torch's, for few rows and many."""

import pytest
import torch

from fastdiff import nn
from fastdiff.nn.linear import ROWS


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(6,), (0, 6), (3, 6), (2, ROWS, 6)], ids=str)
def test_is_torchs(shape, bias):
    theirs = torch.nn.Linear(6, 5, bias)
    mine = nn.Linear(6, 5, bias)
    mine.load_state_dict(theirs.state_dict())
    x = torch.randn(shape)
    sides = []
    for module in (mine, theirs):
        given = x.clone().requires_grad_()
        out = module(given)
        out.sin().sum().backward()
        sides.append((out, given.grad, *(p.grad for p in module.parameters())))
    for got, want in zip(*sides, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
