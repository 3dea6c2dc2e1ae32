"""The CUDA kernels of patchify on the CPU, against the reference."""

import numpy as np
import pytest
import torch

from fastdiff.ops.patchify import reference


def pad(values, fill):
    return [fill] * (3 - len(values)) + list(values)


@pytest.mark.parametrize("order", ["pqc", "cpq"])
@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_patchify(emulator, order, dtype):
    grid, patch, B, C = (3, 5), (4, 2), 2, 3
    shape = (B, C, 12, 10)
    x = np.random.default_rng(0).integers(0, 65535, shape, dtype)
    expected = reference.patchify(torch.from_numpy(x.astype(np.int64)), patch, order).numpy().astype(dtype)
    tokens = np.full(expected.shape, -1, np.int64).astype(dtype)
    sizes = (pad(grid, 1), pad(patch, 1), (B, C), order == "pqc")
    strides = [C * 120, 120, 0, 10, 1]
    emulator.patchify(True, 1, x, 0, strides, tokens, *sizes)
    np.testing.assert_array_equal(tokens, expected)
    image = np.full(shape, -1, np.int64).astype(dtype)
    emulator.patchify(False, 2, image, 0, strides, tokens, *sizes)
    np.testing.assert_array_equal(image, x)
