"""What is peculiar to merge_attention: it is also where every half-precision number passes through the SIMD conversions."""

import os
import subprocess
import sys

import pytest
import torch

from fastdiff import ops

CHECK = """
import torch
from fastdiff import ops
from fastdiff.core import native

assert native.WHY_NOT["cpu"] is None, native.WHY_NOT["cpu"]
for dtype in (torch.float16, torch.bfloat16):
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype).view(1, 1, 256, 256)
    other = every.flatten()[torch.randperm(1 << 16, generator=torch.Generator().manual_seed(0))].view_as(every)
    lse = torch.zeros(1, 1, 256)
    alone, _ = ops.merge_attention(every, lse, torch.zeros_like(every), lse - torch.inf)
    assert torch.equal(alone.nan_to_num(7.0), every.nan_to_num(7.0)) and torch.equal(alone.isnan(), every.isnan())
    mean, top = ops.merge_attention(every, lse, other, lse)
    expected = (every.float() * 0.5 + other.float() * 0.5).to(dtype)
    assert torch.equal(mean.nan_to_num(7.0), expected.nan_to_num(7.0)) and torch.equal(mean.isnan(), expected.isnan())
    torch.testing.assert_close(top, torch.full_like(top, 2.0).log())
"""


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512bf16"])
def test_every_half_number_survives_conversion(isa):
    done = subprocess.run([sys.executable, "-c", CHECK], env=os.environ | {"FASTDIFF_ISA": isa}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_merging_splits_is_attention_over_all_keys():
    q, k, v = (torch.randn(2, 3, n, 40) for n in (17, 90, 90))
    whole, whole_lse = ops.attention_with_lse(q, k, v)
    out, lse = ops.attention_with_lse(q, k[:, :, :31], v[:, :, :31])
    for part in (slice(31, 32), slice(32, 90)):
        out, lse = ops.merge_attention(out, lse, *ops.attention_with_lse(q, k[:, :, part], v[:, :, part]))
    torch.testing.assert_close(out, whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, whole_lse, rtol=1e-6, atol=1e-6)
