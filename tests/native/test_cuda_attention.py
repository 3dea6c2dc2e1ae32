"""The CUDA kernels of attention on the CPU, against the reference in float64: sizes, splits, strides, bias, lengths, causal."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastdiff.ops.attention import reference

SETTINGS = settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
TYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def _numpy(x):
    return x.numpy() if x.dtype in (torch.float32, torch.int64) else x.view(torch.int16).numpy().view(np.uint16)


def _aligned(n, dtype):
    """n elements, NaN, at 16 aligned bytes."""
    memory = torch.full((n + 16,), torch.nan, dtype=dtype)
    start = -memory.data_ptr() % 16 // dtype.itemsize
    return memory[start:start + n]


def _stored(x, layout):
    """(memory, strides) of x (B, H, S, E) in the order of the layout's axes."""
    x = x.permute(layout).contiguous()
    memory = _aligned(x.numel(), x.dtype)
    memory.copy_(x.flatten())
    strides = dict(zip(layout, x.stride(), strict=True))
    return _numpy(memory), [strides[a] for a in range(3)]


def _empty(*shape, dtype=torch.float32):
    return _aligned(int(np.prod(shape)), dtype).view(shape)


def _close(name, got, wanted, dtype, terms):
    """Within the type's rounding of the size that the sums behind it have."""
    assert torch.isfinite(got).all(), name
    error = (got.double() - wanted).abs()
    allowed = ROUNDING[dtype] * (terms + wanted.abs())
    assert (error <= allowed).all(), f"{name}: {(error / allowed).max()} times what is allowed"


def check(emulator, seed, dtype, B, H, M, N, E, layout, bias_axes, lengths, causal, splits, scale=None):
    make = torch.Generator().manual_seed(seed % 2**31)
    randn = lambda *shape: torch.randn(shape, generator=make).to(dtype)
    q, k, v, dout = randn(B, H, M, E), randn(B, H, N, E), randn(B, H, N, E), randn(B, H, M, E)
    bias = randn(*(full if axis else 1 for full, axis in zip((B, H, M, N), bias_axes, strict=True))) if bias_axes else None
    if bias is not None and seed % 2:
        bias[..., : (N + 1) // 2] = -torch.inf
    lengths = torch.randint(0, N + 1, (B,), generator=make) if lengths else None
    dlse = torch.randn((B, H, M), generator=make)
    scale = E**-0.5 if scale is None else scale
    exact = [x if x is None else x.double() for x in (q, k, v, bias)]
    out, _, lse, _ = reference.attention(*exact, lengths, causal, scale)
    grads = reference.attention_backward(dout.double(), dlse.double(), *exact, lengths, out, None, lse, torch.zeros_like(lse), causal,
                                         scale, False, False)[:3]

    kind, sizes = TYPES.index(dtype), [B, H, M, N, E]
    memory, strides = zip(*(_stored(x, layout) for x in (q, k, v)), strict=True)
    strides = [int(s) for each in strides for s in each]
    bias_memory = None if bias is None else _numpy(bias)
    bias_strides = [0] * 4 if bias is None else [int(s) for s in bias.expand(B, H, M, N).stride()]
    common = (*memory, strides, bias_memory, bias_strides, None if lengths is None else lengths.numpy(), causal, scale)

    def cut(length, step):
        per = max(1, -(-length // splits // step)) * step
        return [max(1, -(-length // per)), per]

    step = 32 if dtype == torch.float32 else 64
    by = cut(N, step)
    got, low = _empty(B, H, M, E, dtype=dtype), None if dtype == torch.float32 else _empty(B, H, M, E, dtype=dtype)
    got_lse, lse_low = _empty(B, H, M), _empty(B, H, M)
    parts = (_empty(by[0], B, H, M, E), _empty(by[0], B, H, M), _empty(by[0], B, H, M)) if by[0] > 1 else (None,) * 3
    arrays = lambda *xs: [None if x is None else _numpy(x.flatten()) for x in xs]
    emulator.attention(seed, kind, sizes, *common, *arrays(got, low, got_lse, lse_low, *parts), by)
    sums = reference.softmax(reference.scores(*exact[:2], exact[3], lengths, causal, scale)) @ exact[2].abs()
    _close("out", got, out, dtype, sums)
    seen = lse > -torch.inf
    assert (got_lse[~seen] == -torch.inf).all()
    _close("lse", got_lse[seen], lse[seen], torch.float32, 4 + E**0.5)
    if low is not None:  # out and what it leaves over know more than out
        _close("out + low", got.double() + low.double() / 2048, out, dtype, sums)

    if dtype == torch.float32 and E > 64:
        return
    # Blocks that share the keys and blocks that share the queries.
    by = cut(N, step) + cut(M, 16 if E > 64 else step)
    dq, dk, dv = (_empty(*x.shape, dtype=dtype) for x in (q, k, v))
    parts = [_empty(n, *x.shape) if n > 1 else None for n, x in ((by[0], q), (by[2], k), (by[2], v))]
    saved = (got, low, got_lse, lse_low, _empty(4, B, H, M))
    emulator.attention_backward(seed, kind, sizes, *arrays(dout, dlse), *common, *arrays(*saved, dq, dk, dv, *parts), by)
    for name, mine, wanted, rows in (("dq", dq, grads[0], N), ("dk", dk, grads[1], M), ("dv", dv, grads[2], M)):
        _close(name, mine, wanted, dtype, 6 * max(1.0, scale) * max(1, rows)**0.5 * max(1.0, E**0.5 / 4))


@given(seed=st.integers(0, 2**32), dtype=st.sampled_from(TYPES), B=st.integers(1, 2), H=st.integers(1, 2),
       M=st.sampled_from([1, 3, 16, 63, 70]), N=st.sampled_from([1, 2, 17, 64, 65, 130]), E=st.sampled_from([8, 32, 40, 64, 72]),
       layout=st.sampled_from([(0, 1, 2, 3), (0, 2, 1, 3), (2, 1, 0, 3)]),
       bias_axes=st.sampled_from([None, None, (0, 0, 0, 1), (1, 1, 1, 1), (1, 0, 1, 0)]),
       lengths=st.booleans(), causal=st.booleans(), splits=st.integers(1, 3))
@SETTINGS
def test_attention(emulator, seed, dtype, B, H, M, N, E, layout, bias_axes, lengths, causal, splits):
    check(emulator, seed, dtype, B, H, M, N, E, layout, bias_axes, lengths, causal, splits)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("M", "N", "splits"), [(7, 200, 3), (150, 20, 3)])
def test_reads_and_writes(emulator, dtype, M, N, splits):
    check(emulator, 1, dtype, 1, 1, M, N, 128, (0, 2, 1, 3), None, False, False, splits)


def test_shares_fill_the_chip(emulator):
    facts = np.zeros(6, np.int64)
    emulator.attention_shares(facts, 90, 1, [1, 8, 256, 32768, 64])
    assert facts[0] > 1 and facts[1] % 64 == 0 and facts[0] * facts[1] >= 32768
    emulator.attention_shares(facts, 90, 1, [1, 8, 16384, 256, 64])
    assert facts[0] == facts[2] == 1 and facts[4] > 1 and facts[4] * facts[5] >= 16384
    emulator.attention_shares(facts, 80, 0, [0, 1, 1, 0, 64])
    assert (facts > 0).all()
