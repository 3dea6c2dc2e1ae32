"""Times of several ways to compute one thing, interleaved call by call so that a noisy machine disturbs all of them alike."""

import time
from dataclasses import dataclass
from itertools import count
from statistics import median

import torch

CLOCK_HZ = 2e9  # of a GPU, roughly: only how long a queue is held back follows from it


@dataclass(frozen=True)
class Budget:
    """When timing may stop: after `pairs` rounds that took `least` seconds, or after `most` seconds and `fewest` rounds."""

    pairs: int = 30
    least: float = 0.5
    most: float = 3.0
    fewest: int = 5

    def spent(self, rounds, seconds):
        return (rounds >= self.pairs and seconds >= self.least) or (rounds >= self.fewest and seconds >= self.most)


QUICK = Budget(pairs=10, least=0.1, most=1.0, fewest=3)


def interleave(calls, budget, clock=time.perf_counter):
    """Seconds of each call, one per round: {name: [seconds]}. calls: name -> function of a running index, which picks the input copy.

    The order rotates from round to round, and every call of a round works on another index.
    """
    names = list(calls)
    samples = {name: [] for name in names}
    index, begin = count(), clock()
    for turn in count():
        for name in names[turn % len(names):] + names[:turn % len(names)]:
            i = next(index)
            before = clock()
            result = calls[name](i)
            samples[name].append(clock() - before)
            del result
        if budget.spent(turn + 1, clock() - begin):
            return samples


def interleave_cuda(calls, budget, device):
    """As `interleave`, between events on the GPU, with its L2 overwritten before each call: ({name: [seconds]}, {name: host seconds}).

    The queue is held back while the host fills it, so that launch gaps do not count; host seconds: of a call not waited for.
    """
    names = list(calls)
    flush = torch.empty(2 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.int8, device=device)
    host = {}
    for name in names:
        times = []
        for i in range(10):
            torch.cuda.synchronize(device)
            before = time.perf_counter()
            calls[name](i)
            times.append(time.perf_counter() - before)
        host[name] = median(times)
    hold = int(2 * sum(host.values()) * CLOCK_HZ)
    samples = {name: [] for name in names}
    index, begin = count(), time.perf_counter()
    for turn in count():
        torch.cuda._sleep(hold)
        events = []
        for name in names[turn % len(names):] + names[:turn % len(names)]:
            flush.zero_()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            calls[name](next(index))
            end.record()
            events.append((name, start, end))
        torch.cuda.synchronize(device)
        for name, start, end in events:
            samples[name].append(start.elapsed_time(end) / 1e3)
        if budget.spent(turn + 1, time.perf_counter() - begin):
            return samples, host


def percentile(values, percent):
    """Linear between the two nearest ranks."""
    values = sorted(values)
    at = (len(values) - 1) * percent / 100
    low = int(at)
    high = min(low + 1, len(values) - 1)
    return values[low] + (values[high] - values[low]) * (at - low)


def compare(samples, ours="ours"):
    """The timing keys of a record: medians in ms, the fastest peer, its median over ours, and the spread of the ratio pair by pair."""
    ms = {name: median(times) * 1e3 for name, times in samples.items()}
    mine = ms.pop(ours)
    keys = {"ours_ms": mine, "peers_ms": ms, "best_peer": None, "ratio": None, "ratio_low": None, "ratio_high": None}
    if ms:
        best = min(ms, key=ms.get)
        pairs = [peer / own for peer, own in zip(samples[best], samples[ours], strict=True)]
        keys.update(best_peer=best, ratio=ms[best] / mine, ratio_low=percentile(pairs, 20), ratio_high=percentile(pairs, 80))
    return keys
