"""The CUDA kernel of the frequency ops on the CPU, against the references: sizes, dtypes, planes that do not fill a block, shared gains."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastdiff.ops.dct import reference

SETTINGS = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORWARD, INVERSE, MIX, SEPARABLE = range(4)


def _numbers(x):
    """The memory of a contiguous tensor as numpy knows it, None for none."""
    if x is None:
        return None
    x = x.contiguous().flatten()
    return x.view(torch.int16).numpy().view(np.uint16) if x.dtype.itemsize == 2 else x.numpy()


def _run(emulator, seed, kind, x, eps=None, noise=None, gains=(None,) * 3, separable=(None,) * 4):
    y = torch.full(x.shape, torch.nan, dtype=x.dtype)
    strides = [0 if g is None or g.shape[i] == 1 else g.stride(i) for g in gains for i in range(4)]
    emulator.dct(seed, DTYPES.index(x.dtype), kind, x.shape[-1], x.shape[1], *map(_numbers, (x, y, eps, noise, *gains)), strides,
                 *map(_numbers, separable))
    return y


def _close(y, exact, plain):
    """Within twice plain PyTorch's error and one rounding."""
    error, allowed = ((t.double() - exact).abs().max().item() for t in (y, plain))
    assert error <= 2 * allowed + torch.finfo(y.dtype).eps * exact.abs().max().item(), (error, allowed)


def _gain(n, B, C, shared):
    return torch.randn(B if shared & 1 else 1, C if shared & 2 else 1, n, n)


@given(seed=st.integers(0, 2**32), n=st.sampled_from([16, 16, 32, 64, 128]), B=st.integers(1, 3), C=st.integers(1, 3),
       dtype=st.sampled_from(DTYPES), kind=st.integers(0, 3), extra=st.integers(0, 3), shared=st.integers(0, 3))
@SETTINGS
def test_transform(emulator, seed, n, B, C, dtype, kind, extra, shared):
    torch.manual_seed(seed)
    if n == 128:
        B = C = 1
    x, eps, noise = (torch.randn(B, C, n, n).to(dtype) for _ in range(3))
    wide = lambda *ts: [None if t is None else t.double() for t in ts]
    if kind in (FORWARD, INVERSE):
        arguments = (2, kind == INVERSE)
        y, exact, plain = _run(emulator, seed, kind, x), reference.dct(x.double(), *arguments), reference.dct(x, *arguments)
    elif kind == MIX:
        gains = [_gain(n, B, C, shared), _gain(n, B, C, shared) if extra & 1 else None, _gain(n, B, C, shared) if extra & 2 else None]
        eps, noise = eps if extra & 1 else None, noise if extra & 2 else None
        of = [x, gains[0], eps, gains[1], noise, gains[2]]
        y = _run(emulator, seed, kind, x, eps, noise, gains)
        exact, plain = reference.frequency_mix(*wide(*of), 2), reference.frequency_mix(*of, 2)
    else:
        rows, columns, base, sigma = torch.rand(B, n), torch.rand(B, n), torch.rand(B), torch.rand(B)
        noise, sigma = (noise, sigma) if extra & 1 else (None, None)
        of = [x, rows, columns, base, noise, sigma]
        y = _run(emulator, seed, kind, x, None, noise, separable=(rows, columns, base, sigma))
        exact, plain = reference.separable_gain(*wide(*of)), reference.separable_gain(*of)
    _close(y, exact, plain)


def test_other_sizes_are_refused(emulator):
    with pytest.raises(RuntimeError, match="16, 32, 64 or 128"):
        _run(emulator, 0, FORWARD, torch.zeros(1, 1, 8, 8))
