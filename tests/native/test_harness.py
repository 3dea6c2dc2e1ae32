"""The harness itself: right kernels give the right numbers, and every planted bug is found, whatever the order of threads."""

import numpy as np
import pytest
import torch

SEEDS = range(8)


def normal(*shape):
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def fails(call, match):
    for seed in SEEDS:
        with pytest.raises(RuntimeError, match=match):
            call(seed)


def test_reverse(emulator):
    x = normal(3, 64)
    for seed in SEEDS:
        y = np.full_like(x, np.nan)
        emulator.reverse(seed, 64, x, y, 0)
        np.testing.assert_array_equal(y, x[:, ::-1])


@pytest.mark.parametrize(("bug", "match"), [
    (1, "race|nobody wrote"),  # a missing barrier
    (2, r"shared memory: element 64 of 64"),  # an index one too far in shared memory
    (3, "never come: .*__syncthreads; 1 have ended"),  # a barrier that a thread does not reach
    (4, r"global memory: element 192 of 192"),  # an index one too far in global memory
    (5, "the launch gave 240"),  # too little shared memory
])
def test_reverse_bugs(emulator, bug, match):
    x = normal(3, 64)
    fails(lambda seed: emulator.reverse(seed, 64, x, np.empty_like(x), bug), match)


def test_sum(emulator):
    x = normal(3, 96)
    for seed in SEEDS:
        y = np.full(3, np.nan, np.float32)
        emulator.sum(seed, 96, x, y, 0)
        np.testing.assert_allclose(y, x.sum(1), rtol=1e-5)


@pytest.mark.parametrize(("bug", "match"), [
    (1, "mask does not name the calling lane"),  # half a mask, called by all
    (2, "never come: .*__shfl_xor_sync"),  # a mask that names a lane that has left
    (4, "nobody wrote"),  # a partial sum of a warp that is not there
])
def test_sum_bugs(emulator, bug, match):
    x = normal(3, 96)
    fails(lambda seed: emulator.sum(seed, 96, x, np.empty(3, np.float32), bug), match)


def test_a_lane_outside_the_mask_gives_poison(emulator):
    y = np.zeros(3, np.float32)
    emulator.sum(0, 96, normal(3, 96), y, 3)
    assert np.isnan(y).all()


def test_masks_name_lanes_that_are_there(emulator):
    fails(lambda seed: emulator.sum(seed, 48, normal(48), np.empty(1, np.float32), 0), "lane .., which the block does not have")


def test_stream(emulator):
    x = normal(5, 4 * 40)
    for seed in SEEDS:
        y = np.full_like(x, np.nan)
        emulator.stream(seed, 40, 5, x, y, 0)
        np.testing.assert_array_equal(y, x)


@pytest.mark.parametrize(("bug", "match"), [
    (1, "a copy to it is under way"),  # no wait
    (2, "race|under way|nobody wrote"),  # no barrier after the wait
    (3, "race|under way"),  # no barrier before the buffer is filled again
])
def test_stream_bugs(emulator, bug, match):
    x = normal(5, 4 * 40)
    fails(lambda seed: emulator.stream(seed, 40, 5, x, np.empty_like(x), bug), match)


@pytest.mark.parametrize("threads", [32, 64])
def test_count(emulator, threads):
    x = np.random.default_rng(0).integers(0, 8, (3, threads), np.int32)
    for seed in SEEDS:
        y = np.zeros(8, np.int32)
        emulator.count(seed, threads, x, y, 0)
        np.testing.assert_array_equal(y, np.bincount(x.ravel(), minlength=8))


@pytest.mark.parametrize("bug", [1, 2])  # an addition that is not atomic, no __syncwarp
def test_count_bugs(emulator, bug):
    x = np.random.default_rng(0).integers(0, 8, (3, 32), np.int32)
    fails(lambda seed: emulator.count(seed, 32, x, np.zeros(8, np.int32), bug), "race")


def test_order(emulator):
    def run(seed):
        seen = np.full((2 * 3 * 2, 2, 30), -1, np.int32)
        emulator.order(seed, np.zeros(1, np.int32), seen)
        return seen

    first, again, other = run(1), run(1), run(2)
    assert (np.sort(first.ravel()) == np.arange(first.size)).all()
    assert (first == again).all()
    assert (first[:, 0].argsort(1) != other[:, 0].argsort(1)).any(1).all(), "threads ran in the same order under another seed"
    assert (first[:, 0].argsort(1) != first[:, 1].argsort(1)).any(1).all(), "threads ran in the same order after a barrier"
    assert (first[:, 0].max(1) < first[:, 1].min(1)).all(), "a thread passed the barrier before all had come"


@pytest.mark.parametrize("K", [8, 16])
@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_multiply(emulator, name, dtype, K):
    a, b = (torch.from_numpy(normal(*shape)).to(dtype) for shape in ((16, K), (K, 8)))
    d = np.full((16, 8), np.nan, np.float32)
    bits = lambda x: x.view(torch.int16).numpy()
    getattr(emulator, f"multiply_{name}_{K}")(3, bits(a), bits(b), d)
    np.testing.assert_allclose(d, a.float() @ b.float(), rtol=1e-5, atol=1e-5)


def test_multiply_tf32(emulator):
    a, b, d = normal(16, 8), normal(8, 8), np.full((16, 8), np.nan, np.float32)
    emulator.multiply_tf32(3, a, b, d)
    np.testing.assert_allclose(d, a @ b, atol=0.01)
    assert abs(d - a @ b).max() > 1e-5, "operands have 10 bits of fraction"


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_convert(emulator, name, dtype):
    every = torch.arange(-2**15, 2**15).to(torch.int16).view(dtype).float()
    between = torch.from_numpy(np.random.default_rng(0).integers(0, 2**32, 2**16, np.uint32).view(np.float32))
    middle = (every[:-1].double() + every[1:].double()).float() / 2
    x = torch.cat([every, between, middle[: 2**15]]).contiguous().numpy()
    y, z = np.empty(x.size, np.uint16), np.empty_like(x)
    getattr(emulator, f"convert_{name}")(x, y, z)
    expected = torch.from_numpy(x).to(dtype)
    np.testing.assert_array_equal(z, expected.float().numpy())
    number = ~np.isnan(x)
    np.testing.assert_array_equal(y[number], expected.view(torch.int16).numpy().view(np.uint16)[number])


@pytest.mark.parametrize("width", [8, 32])
@pytest.mark.parametrize("by", [1, 4, 6])
def test_exchange(emulator, by, width):
    y = np.full((6, 32), -1, np.int32)
    emulator.exchange(5, y, by, width)
    lane = np.arange(32)
    group = lane // width * width
    np.testing.assert_array_equal(y[0], group + by)
    np.testing.assert_array_equal(y[1], np.where(lane - by >= group, lane - by, lane))
    np.testing.assert_array_equal(y[2], np.where(lane + by < group + width, lane + by, lane))
    np.testing.assert_array_equal(y[3], lane ^ by)
    assert (y[4].view(np.uint32) == sum(1 << i for i in lane if i % width == by)).all()
    assert (y[5] == 1 + 4 * by).all()


def test_named_barriers(emulator):
    y = np.full(128, -1, np.int32)
    for seed in SEEDS:
        emulator.hand_over(seed, y, 0)
        np.testing.assert_array_equal(y, (np.arange(128).reshape(2, 2, 32)[:, ::-1]).ravel())
    fails(lambda seed: emulator.hand_over(seed, y, 1), "race|nobody wrote")


def test_misaligned(emulator):
    with pytest.raises(RuntimeError, match="not aligned"):
        emulator.misaligned(normal(8), np.empty(8, np.float32))


def test_shared_memory_of_a_chip(emulator):
    x = normal(1, 64)
    emulator.shared_memory(90, 200 << 10, x)
    with pytest.raises(RuntimeError, match="at most 166912 bytes of shared memory"):
        emulator.shared_memory(80, 200 << 10, x)
