"""A model before and after `accelerate`, on an example: errors and times."""

from contextlib import ExitStack, contextmanager
from statistics import median
from time import perf_counter

import torch
from torch.utils._pytree import tree_leaves

RUNS = 5


def difference(plain, other):
    """(largest absolute difference, the same relative to the largest magnitude of `plain`) over the floating tensors of two outputs."""
    pairs = [(a.double(), b.double()) for a, b in zip(tree_leaves(plain), tree_leaves(other), strict=True)
             if isinstance(a, torch.Tensor) and a.is_floating_point() and a.numel()]
    error = max(((a - b).abs().max().item() for a, b in pairs), default=0.0)
    size = max((a.abs().max().item() for a, _ in pairs), default=0.0)
    return error, error / size if size else error


@contextmanager
def _steady(model):
    """Eval mode without gradients; modes and random states come back afterwards."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng():
            yield
    finally:
        for m, mode in modes:
            m.training = mode


def measure(report, model, swaps, example):
    """Fills the errors and times of `report`; swaps: (module, its class, its replacement), in the order of report.replaced."""
    arguments, keywords = (), {}
    if isinstance(example, dict):
        keywords = example
    else:
        arguments = example if isinstance(example, tuple) else (example,)
    tensors = [*tree_leaves((arguments, keywords)), *model.parameters()]
    wait = torch.cuda.synchronize if any(isinstance(t, torch.Tensor) and t.is_cuda for t in tensors) else lambda: None

    def run(side):
        """The model's output and its seconds, with the modules plain (1) or replaced (2)."""
        for swap in swaps:
            swap[0].__class__ = swap[side]
        torch.manual_seed(0)
        wait()
        start = perf_counter()
        out = model(*arguments, **keywords)
        wait()
        return out, perf_counter() - start

    # Those inside others are looked at apart: with hooks on them, their holder's replacement would let the original run.
    held = {id(m) for swap in swaps for m in swap[0].modules() if m is not swap[0]}
    pairs = list(zip(report.replaced, swaps, strict=True))
    groups = [[(row, swap) for row, swap in pairs if (id(swap[0]) in held) == inside] for inside in (False, True)]
    groups = list(filter(None, groups)) or [[]]
    with _steady(model):
        for group in groups:
            with ExitStack() as hooks:
                for row, swap in group:
                    hooks.enter_context(_compared(row, *swap))
                plain, _ = run(1)
        report.error, report.relative = difference(plain, run(2)[0])
        times = [(run(1)[1], run(2)[1]) for _ in range(RUNS)]
        report.time_before, report.time_after = map(median, zip(*times, strict=True))
        for group in groups:
            with ExitStack() as hooks:
                timers = [hooks.enter_context(_timed(swap[0], wait)) for _, swap in group]
                sums = [[], []]
                for _ in range(RUNS):
                    for side in (1, 2):
                        for timer in timers:
                            timer.clear()
                        run(side)
                        sums[side - 1].append([sum(timer) for timer in timers])
            for (row, _), before, after, timer in zip(group, zip(*sums[0], strict=True), zip(*sums[1], strict=True), timers, strict=True):
                if timer:
                    row.time_before, row.time_after = median(before), median(after)


@contextmanager
def _compared(row, module, plain, fast):
    """Within, each call of the plain module also runs the replacement on the same input and notes the largest error in `row`."""

    def after(m, arguments, keywords, out):
        m.__class__ = fast
        try:
            error, relative = difference(out, m.forward(*arguments, **keywords))
        finally:
            m.__class__ = plain
        row.error, row.relative = max(row.error or 0.0, error), max(row.relative or 0.0, relative)

    handle = module.register_forward_hook(after, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _timed(module, wait):
    """A list that gets the seconds of every call of the module."""
    seconds, started = [], []

    def before(m, arguments):
        wait()
        started.append(perf_counter())

    def after(m, arguments, out):
        wait()
        seconds.append(perf_counter() - started.pop())

    handles = module.register_forward_pre_hook(before), module.register_forward_hook(after)
    try:
        yield seconds
    finally:
        for handle in handles:
            handle.remove()
