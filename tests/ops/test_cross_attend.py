"""What is peculiar to cross_attend: values of a width of their own, and one part or several."""

import sys
from dataclasses import replace

import pytest
import torch

from fastdiff import ops
from fastdiff.core.case import OneOf
from fastdiff.ops.cross_attend import reference
from fastdiff.ops.cross_attend.cases import CASES
from fastdiff.testing import check


def _meaning(*, target_norm=None, source_norm=None, heads, eps, residual, **tensors):
    return reference.cross_attend(**tensors, target_norm_0=target_norm and target_norm[0], target_norm_1=target_norm and target_norm[1],
                                  source_norm_0=source_norm and source_norm[0], source_norm_1=source_norm and source_norm[1],
                                  heads=heads, eps=eps, residual=residual)


def test_values_of_a_width_of_their_own():
    case = CASES["cross_attend"]
    check(ops.cross_attend, _meaning, replace(case, dims=case.dims | dict(value_width=OneOf(1, 5, 19))), examples=30,
          properties=("values", "gradients", "repeatable", "compiled"))


def _layer(M, N, dtype=torch.float64):
    torch.manual_seed(0)
    shapes = dict(target=(2, M, 12), source=(2, N, 10), q_weight=(8, 12), k_weight=(8, 10), v_weight=(24, 10), out_weight=(12, 24),
                  q_bias=(8,), k_bias=(8,), v_bias=(24,), out_bias=(12,))
    return {name: torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for name, shape in shapes.items()}


@pytest.mark.parametrize("M, N", [(5, 900), (900, 5)])
def test_several_parts_are_one(M, N, monkeypatch):
    """A part is of no fewer than 256 rows: a long side of 900 has three."""
    exact, wanted = _layer(M, N), None
    module = sys.modules[ops.cross_attend.__module__]
    monkeypatch.setattr(module, "_CPU", module._CPU._replace(chunk=1024))
    for kept in (module.KEPT, 0):
        monkeypatch.setattr(module, "KEPT", kept)
        leaves = _layer(M, N, torch.float32)
        out = ops.cross_attend(**leaves, heads=2)
        grads = torch.autograd.grad(out.square().sum(), list(leaves.values()))
        if wanted is None:
            out64 = ops.cross_attend(**exact, heads=2)
            wanted = out64, *torch.autograd.grad(out64.square().sum(), list(exact.values()))
        for ours, theirs in zip((out, *grads), wanted, strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item() + 1e-4)
