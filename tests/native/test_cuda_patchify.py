"""The CUDA kernels of patchify and space_to_depth on the CPU, against the reference: sizes, orders, strides, alignments."""

from math import prod

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastdiff.ops.patchify import reference

SETTINGS = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
GRIDS = st.sampled_from([(1,), (7,), (40,), (3, 5), (1, 1), (2, 33), (9, 16), (2, 3, 4), (1, 5, 2), (3, 1, 8)])


def _pad(values, fill):
    return [fill] * (3 - len(values)) + list(values)


def _array(values, offset, spare):
    """(memory with `offset` elements before and `spare` after, poisoned; the part between), 128-byte aligned at its start."""
    memory = np.full(values.size + offset + spare + 128, 0xffff, np.int64).astype(values.dtype)
    start = -memory.ctypes.data % 128 // memory.itemsize
    memory = memory[start:start + values.size + offset + spare]
    part = memory[offset:offset + values.size]
    part[:] = values.ravel()
    return memory, part


def check(emulator, seed, size, B, C, grid, patch, order, columns, layout, offset):
    rng = np.random.default_rng(seed)
    dtype = {2: np.uint16, 4: np.uint32}[size]
    space = tuple(g * p for g, p in zip(grid, patch, strict=True))
    x = rng.integers(0, 2**16 - 1, (B, C, *space), np.int64)
    forward = reference.space_to_depth if columns else reference.patchify
    expected = forward(torch.from_numpy(x), patch, order).numpy().astype(dtype)
    axes = range(x.ndim) if layout == "contiguous" else (0, *range(2, x.ndim), 1) if layout == "channels last" else range(x.ndim)[::-1]
    stored = np.ascontiguousarray(x.transpose(tuple(axes))).astype(dtype)
    strides = dict(zip(axes, np.array(stored.strides) // size, strict=True))
    stride = [strides[0], strides[1], *_pad([strides[a] for a in range(2, x.ndim)], 0)]
    sizes = (_pad(grid, 1), _pad(patch, 1), B, C, order == "pqc", columns)
    memory, _ = _array(stored, offset, 0)
    tokens_memory, tokens = _array(np.full(expected.size, 2**16 - 1).astype(dtype), 0, 0)
    emulator.patchify(True, seed, memory, offset, tokens_memory, stride, *sizes)
    np.testing.assert_array_equal(tokens.reshape(expected.shape), expected)
    memory, image = _array(np.full(stored.size, 2**16 - 1).astype(dtype), offset, 0)
    emulator.patchify(False, seed, memory, offset, tokens_memory, stride, *sizes)
    np.testing.assert_array_equal(image.reshape(stored.shape), stored)


@given(seed=st.integers(0, 2**32), size=st.sampled_from([2, 4]), B=st.integers(1, 2), C=st.integers(1, 9), grid=GRIDS,
       side=st.integers(1, 8), square=st.booleans(), order=st.sampled_from(["pqc", "cpq"]), columns=st.booleans(),
       layout=st.sampled_from(["contiguous", "channels last", "reversed"]), offset=st.sampled_from([0, 0, 1, 4]))
@SETTINGS
def test_move(emulator, seed, size, B, C, grid, side, square, order, columns, layout, offset):
    patch = tuple(side if square else 1 + (side + i) % 4 for i in range(len(grid)))
    check(emulator, seed, size, B, C, grid, patch, order, columns, layout, offset)


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize(("C", "grid", "patch"), [(3, (2, 24), (16, 16)), (2048, (1, 3), (2, 2)), (8192, (3,), (1,)), (1, (2,), (8192,))])
def test_large_patches(emulator, columns, C, grid, patch):
    """Rows in parts, and patches up to the largest."""
    for size, layout, order in ((2, "contiguous", "pqc"), (4, "channels last", "cpq")):
        check(emulator, 1, size, 1, C, grid, patch, order, columns, layout, 0)


def test_too_large(emulator):
    with pytest.raises(RuntimeError, match="too many elements"):
        check(emulator, 1, 4, 1, 8193, (1,), (1,), "pqc", False, "contiguous", 0)


@pytest.mark.parametrize(("size", "C", "grid", "patch", "columns", "wide"), [
    (4, 3, (32, 32), (8, 8), False, (4, 4)), (2, 3, (32, 32), (8, 8), False, (8, 8)), (2, 4, (32, 32), (2, 2), False, (8, 8)),
    (2, 3, (32, 32), (2, 2), False, (8, 4)), (4, 3, (8, 32, 32), (2, 4, 4), False, (4, 4)), (4, 3, (32, 32), (8, 8), True, (4, 4)),
    (2, 4, (32, 32), (2, 2), True, (8, 8)), (2, 3, (3, 5), (3, 3), True, (1, 1))])
def test_accesses_are_wide(emulator, size, C, grid, patch, columns, wide):
    """Common sizes are moved by 16 bytes on both sides, and a tile is at least 4 KiB where the sample has as much."""
    facts, aligned = np.zeros(4, np.int64), _array(np.zeros(8), 0, 0)[0]
    space = [g * p for g, p in zip(grid, patch, strict=True)]
    stride = [C * prod(space), prod(space), *_pad([prod(space[i + 1:]) for i in range(len(space))], 0)]
    emulator.patchify_plan(facts, size, aligned, aligned, stride, _pad(grid, 1), _pad(patch, 1), 2, C, True, columns)
    assert tuple(facts[:2]) == wide
    patch_bytes = size * C * prod(patch)
    assert facts[2] * facts[3] * patch_bytes >= min(4096, prod(grid) * patch_bytes)


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("order", ["pqc", "cpq"])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(("C", "grid", "patch"), [
    (3, (2, 32), (8, 8)), (4, (8, 32), (2, 2)), (3, (2, 3, 32), (2, 4, 4)), (3, (1, 16), (16, 16))])
def test_memory_is_used_well(emulator, C, grid, patch, size, order, columns):
    """Bank conflicts are four-fold at most on average, and no sector of global memory is asked for that is not used up."""
    dtype, space = {2: np.uint16, 4: np.uint32}[size], [g * p for g, p in zip(grid, patch, strict=True)]
    image, tokens = (_array(np.zeros(C * prod(space), dtype), 0, 0)[0] for _ in range(2))
    stride = [C * prod(space), prod(space), *_pad([prod(space[i + 1:]) for i in range(len(space))], 0)]
    counts = np.zeros((2, 4), np.int64)
    emulator.patchify_counts(counts, image, tokens, stride, _pad(grid, 1), _pad(patch, 1), 1, C, order == "pqc", columns)
    wavefronts, least_wavefronts, sectors, least_sectors = counts.T
    assert (wavefronts <= 4 * least_wavefronts).all(), wavefronts / least_wavefronts
    assert (sectors <= 1.05 * least_sectors).all(), sectors / least_sectors
