"""Ops in the hard life of a process: threads, fork, changed thread counts, no memory left. Read from the registry."""

import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import fastdiff  # noqa: F401  registers the ops
from fastdiff.core.contract import public
from fastdiff.testing.malformed import sample
from fastdiff.testing.properties import forward, reverse, same_bits, subjects

OPS = sorted(public())


def subject(name):
    """The op under its own choice of backend."""
    return replace(next(s for s, _ in subjects(names=[name])), backend=None)


def calls(name, count):
    """`count` examples in float32, of the same sizes for every run."""
    rng = random.Random(5)
    s = subject(name)
    return s, [replace(sample(s.case, rng, 1 << 14), dtype=torch.float32) for _ in range(count)]


def assert_same(a, b):
    for name, y in a.items():
        assert same_bits(y, b[name]), name


@pytest.mark.parametrize("name", OPS)
def test_eight_threads_at_once(name):
    s, examples = calls(name, 24)
    serial = [reverse(s.function, e) for e in examples]
    with ThreadPoolExecutor(8) as pool:
        for alone, together in zip(serial * 4, pool.map(lambda e: reverse(s.function, e), examples * 4), strict=True):
            assert_same(alone, together)


class Forwards(Dataset):
    """Item i: the results of example i, computed in the worker."""

    def __init__(self, name, count):
        self.name, self.count = name, count

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        s, examples = calls(self.name, self.count)
        return {name: y.contiguous() for name, y in forward(s.function, examples[i]).items()}


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
@pytest.mark.parametrize("name", OPS)
def test_after_fork_in_a_loader(name):
    here = Forwards(name, 6)
    expected = [here[i] for i in range(6)]  # the thread pool of this process is up before it forks
    loader = DataLoader(here, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60)
    for mine, theirs in zip(expected, loader, strict=True):
        assert_same(mine, theirs)
    assert_same(expected[0], here[0])


@pytest.mark.parametrize("name", OPS)
def test_thread_count_changed_between_calls(name):
    s, examples = calls(name, 4)
    before = torch.get_num_threads()
    try:
        for e in examples:
            torch.set_num_threads(1)
            one = forward(s.function, e)
            for n in (3, 2, 5, 1):
                torch.set_num_threads(n)
                for key, y in forward(s.function, e).items():
                    torch.testing.assert_close(y, one[key], equal_nan=True)  # to the bit on a kernel: test_contract
    finally:
        torch.set_num_threads(before)


STARVED = """
import random, sys, torch
from dataclasses import replace
from fastdiff.testing.malformed import limit_memory, too_large, sample
from fastdiff.testing.properties import forward, reverse, same_bits, subjects
s = replace(next(s for s, _ in subjects(names=[sys.argv[1]])), backend=None)
rng = random.Random(3)
example = replace(sample(s.case, rng, 1 << 12), dtype=torch.float32)
call = None
while call is None:
    call = too_large(s, rng, replace(sample(s.case, rng, 1 << 12), dtype=torch.float32))
before = reverse(s.function, example)
limit_memory(1 << 30)
held = lambda: int(open("/proc/self/statm").read().split()[0]) * 4096
start = None
for i in range(20):
    for grad in (False, True):
        kwargs = {k: x.detach().requires_grad_(grad) if isinstance(x, torch.Tensor) and x.is_floating_point() else x
                  for k, x in call.kwargs.items()}
        try:
            s.function(**kwargs)
        except (RuntimeError, MemoryError):
            pass
        else:
            sys.exit("a call that cannot have its memory returned")
    start = start or held()
after = reverse(s.function, example)
assert all(same_bits(y, after[k]) for k, y in before.items()), "the call after it has other results"
assert held() - start < 64 << 20, f"{held() - start} bytes were left behind"
print("survived")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits a process by RLIMIT_AS")
@pytest.mark.parametrize("name", OPS)
def test_no_memory_left(name):
    done = subprocess.run([sys.executable, "-c", STARVED, name], check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "survived" in done.stdout, done.stderr[-1500:]
