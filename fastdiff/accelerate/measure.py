"""A model before and after `accelerate`, on an example: errors, times, memory, and which replacements are worth it."""

import os
from contextlib import ExitStack, contextmanager
from statistics import median
from time import perf_counter, thread_time

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._pytree import tree_leaves, tree_map

from .report import Kept

RUNS, SECONDS = 5, 0.5  # at least; up to four times as many while there is time
# Products of rows with weights, and convolutions: what other libraries' kernels do as well as they can be done.
DENSE = frozenset("aten::" + name for name in (
    "mm addmm linear addmv mv _addmm_activation mkldnn_linear mkldnn_convolution convolution_overrideable thnn_conv2d slow_conv2d_forward "
    "_slow_conv2d_forward slow_conv3d_forward slow_conv_transpose2d cudnn_convolution cudnn_convolution_transpose miopen_convolution "
    "_conv_depthwise2d mkldnn_convolution_backward").split())


def difference(plain, other):
    """(largest absolute difference, the same relative to the largest magnitude of `plain`) over the floating tensors of two outputs."""
    pairs = [(a.double(), b.double()) for a, b in zip(tree_leaves(plain), tree_leaves(other), strict=True)
             if isinstance(a, torch.Tensor) and a.is_floating_point() and a.numel()]
    error = max(((a - b).abs().max().item() for a, b in pairs), default=0.0)
    size = max((a.abs().max().item() for a, _ in pairs), default=0.0)
    return error, error / size if size else error


def not_faster(before, after, least=0.97):
    """Whether seconds after are more than `least` of seconds before, by their medians and by their least; 3 % are noise."""
    return median(after) > least * median(before) and min(after) > least * min(before)


def not_worth(forward, step):
    """Whether the original stays: forward and step, with backward too, are (seconds before, seconds after), step None where none is wanted.

    A replacement stays that is faster in one and slower in neither.
    """
    runs = [run for run in (forward, step) if run]
    return all(not_faster(*run) for run in runs) or any(not_faster(*run, 1.03) for run in runs)


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


def _step(call, module, arguments, keywords, now=perf_counter):
    """(gradients of a weighted sum of the outputs of call(*arguments, **keywords), of inputs and of module's parameters, its seconds with
    the forward pass); or None where there are none."""
    fresh = lambda x: x.detach().clone().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
    arguments, keywords = tree_map(fresh, (arguments, keywords))
    wanted = [t for t in (*tree_leaves((arguments, keywords)), *module.parameters()) if isinstance(t, torch.Tensor) and t.requires_grad]
    torch.manual_seed(0)
    with torch.enable_grad():
        start = now()
        outs = [t for t in tree_leaves(call(*arguments, **keywords)) if isinstance(t, torch.Tensor) and t.requires_grad]
        forward = now() - start
        if not outs or not wanted:
            return None
        weights = [torch.linspace(-1, 1, t.numel(), dtype=t.dtype, device=t.device).view(t.shape) for t in outs]
        start = now()
        grads = torch.autograd.grad(outs, wanted, weights, allow_unused=True, materialize_grads=True)
        return grads, forward + now() - start


def _backward_error(plain, fast, module, arguments, keywords):
    """The relative error of the gradients, or None where plain has none."""
    if isinstance(module, torch.nn.parallel.DistributedDataParallel):
        return None  # its reducer would wait for the rest of the backward
    try:
        before = _step(plain, module, arguments, keywords)
    except RuntimeError:  # no derivative
        return None
    return None if before is None else difference(before[0], _step(fast, module, arguments, keywords)[0])[1]


def measure(report, model, swaps, example):
    """Fills the figures of `report` and gives back the modules that are not faster. swaps: (module, its class, its replacement), in the
    order of report.replaced."""
    arguments, keywords = (), {}
    if isinstance(example, dict):
        keywords = example
    else:
        arguments = example if isinstance(example, tuple) else (example,)
    tensors = [*tree_leaves((arguments, keywords)), *model.parameters()]
    cuda = any(isinstance(t, torch.Tensor) and t.is_cuda for t in tensors)
    wait = torch.cuda.synchronize if cuda else lambda: None
    # One thread's own time is not disturbed by other programs.
    clock = thread_time if not cuda and torch.get_num_threads() == 1 else perf_counter
    trained = {id(m) for m in model.modules() if m.training} if any(p.requires_grad for p in model.parameters()) else set()

    def now():
        wait()
        return clock()

    def side(which):
        for swap in swaps:
            swap[0].__class__ = swap[which]

    def run(which):
        """The model's output and its seconds, with the modules plain (1) or replaced (2)."""
        side(which)
        torch.manual_seed(0)
        start = now()
        out = model(*arguments, **keywords)
        return out, now() - start

    def groups():
        # Those inside others are looked at apart: with hooks on them, their holder's replacement would let the original run.
        held = {id(m) for swap in swaps for m in swap[0].modules() if m is not swap[0]}
        pairs = list(zip(report.replaced, swaps, strict=True))
        return list(filter(None, ([(row, swap) for row, swap in pairs if (id(swap[0]) in held) == inside] for inside in (False, True))))

    def leave(reasons):
        """Gives back the modules of these rows."""
        for row, swap in list(zip(report.replaced, swaps, strict=True)):
            if id(row) in reasons:
                report.replaced.remove(row)
                swaps.remove(swap)
                swap[0].__class__ = swap[1]
                report.kept.insert(0, Kept(row.name, row.kind, reasons[id(row)]))

    with _steady(model):
        run(1)
        sizes, steps = {}, {}
        for group in groups():
            with ExitStack() as hooks:
                for row, swap in group:
                    hooks.enter_context(_compared(row, *swap, sizes, steps if id(swap[0]) in trained else None, now))
                run(1)
        reasons = {}
        for group in groups():
            with ExitStack() as hooks:
                timers = [hooks.enter_context(_timed(swap[0], now)) for _, swap in group]
                sums = [[], []]
                end = perf_counter() + SECONDS
                while len(sums[0]) < RUNS + 1 or (len(sums[0]) < 4 * RUNS and perf_counter() < end):
                    for which in (1, 2):
                        for timer in timers:
                            timer.clear()
                        run(which)
                        sums[which - 1].append([sum(timer) for timer in timers])
            alike = {}
            for (row, _), before, after, timer in zip(group, *(list(zip(*s[1:], strict=True)) for s in sums), timers, strict=True):
                if timer:
                    row.time_before, row.time_after = median(before), median(after)
                    step = steps.get(id(row))
                    if step:
                        row.step_before, row.step_after = map(median, step)
                    alike.setdefault((row.kind, sizes.get(id(row)), step is None), []).append((row, (before, after), step))
            for rows in alike.values():  # modules of one class and size are judged together: one by one, noise would decide
                summed = lambda runs: [[sum(run) for run in zip(*side, strict=True)] for side in zip(*runs, strict=True)]
                forward, step = summed([row[1] for row in rows]), summed([row[2] for row in rows]) if rows[0][2] else None
                if not_worth(forward, step):
                    times = ", with backward ".join(f"{1e3 * median(before):.3f} ms as it is, {1e3 * median(after):.3f} ms replaced"
                                                    for before, after in filter(None, (forward, step)))
                    many = f" for {len(rows)} of its kind" if len(rows) > 1 else ""
                    reasons |= {id(row): f"not faster at the example's sizes: {times}{many}" for row, *_ in rows}
        leave(reasons)
        report.error_forward = difference(run(1)[0], run(2)[0])[1]
        call = lambda which: lambda *a, **k: (side(which), model(*a, **k))[1]
        report.error_backward = _backward_error(call(1), call(2), model, arguments, keywords)
        times = [(run(1)[1], run(2)[1]) for _ in range(RUNS)]
        report.time_before, report.time_after = map(median, zip(*times, strict=True))
        if trained and report.error_backward is not None:
            times = [[_step(call(which), model, arguments, keywords, now)[1] for which in (1, 2)] for _ in range(RUNS)]
            report.step_before, report.step_after = map(median, zip(*times, strict=True))
        for which, field in ((1, "memory_before"), (2, "memory_after")):
            _, whole, dense = _profiled(lambda which=which: run(which), [], cuda)  # hooks can change what a model runs
            setattr(report, field, whole)
            report.share_dense = dense if which == 1 else report.share_dense
            for group in groups():
                peaks, *_ = _profiled(lambda which=which: run(which), [swap[0] for _, swap in group], cuda)
                for (row, _), peak in zip(group, peaks, strict=True):
                    setattr(row, field, peak)
    side(2)


@contextmanager
def _around(module, enter, leave):
    """Within, enter() runs before each call of the module and leave() after it."""
    handles = module.register_forward_pre_hook(lambda *_: enter()), module.register_forward_hook(lambda *_: leave())
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _profiled(run, modules, cuda):
    """(peak bytes of tensors during a call of each module above those before it, or None; the same of the whole run; share of the time in
    DENSE)."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # read at a process's first profile: no lines about each start and stop
    opened, names = [], [f"fastdiff:{i}" for i in range(len(modules))]

    def enter(name):
        opened.append(record_function(name))
        opened[-1].__enter__()

    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])], profile_memory=True) as record, \
            ExitStack() as hooks:
        for name, m in zip(names, modules, strict=True):
            hooks.enter_context(_around(m, lambda name=name: enter(name), lambda: opened.pop().__exit__(None, None, None)))
        run()
    events = record.profiler.kineto_results.events()
    device = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    memory = sorted(((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]" and e.device_type() == device),
                    key=lambda e: e[0])

    def peak(start, end):
        now = most = 0
        for when, size in memory:
            if start <= when <= end:
                now += size
                most = max(most, now)
        return most

    ranges = {}
    for e in events:
        if e.name() in names:
            ranges.setdefault(e.name(), []).append(peak(e.start_ns(), e.start_ns() + e.duration_ns()))
    spent = {e.key: e.self_device_time_total if cuda else e.self_cpu_time_total for e in record.key_averages()
             if not e.key.startswith(("fastdiff:", "ProfilerStep", "[memory]"))}
    total = sum(spent.values())
    return ([max(ranges[n]) if n in ranges else None for n in names], peak(-1, float("inf")),
            sum(t for key, t in spent.items() if key in DENSE) / total if total else 0.0)


@contextmanager
def _compared(row, module, plain, fast, sizes, steps, now):
    """Within, each call of the plain module also runs the replacement on the same input and notes the largest errors in `row`, in
    `sizes` the shapes of its inputs and parameters, and unless `steps` is None in it (seconds, seconds replaced) of forward and backward
    of all calls, a few times."""

    def call(kind):
        def forward(*arguments, **keywords):
            module.__class__ = kind
            return module.forward(*arguments, **keywords)

        return forward

    def after(m, arguments, keywords, out):
        try:
            errors = (difference(out, call(fast)(*arguments, **keywords))[1],
                      _backward_error(call(plain), call(fast), m, arguments, keywords))
            if steps is not None and errors[1] is not None:
                step = steps.setdefault(id(row), ([0.0] * RUNS, [0.0] * RUNS))
                for i in range(RUNS):
                    for side, kind in zip(step, (plain, fast), strict=True):
                        side[i] += _step(call(kind), m, arguments, keywords, now)[1]
        finally:
            m.__class__ = plain
        sizes[id(row)] = tuple(t.shape for t in (*tree_leaves((arguments, keywords)), *m.parameters()) if isinstance(t, torch.Tensor))
        row.error_forward = max(row.error_forward or 0.0, errors[0])
        if errors[1] is not None:
            row.error_backward = max(row.error_backward or 0.0, errors[1])

    handle = module.register_forward_hook(after, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _timed(module, now):
    """A list that gets the seconds of every call of the module."""
    seconds, started = [], []

    with _around(module, lambda: started.append(now()), lambda: seconds.append(now() - started.pop())):
        yield seconds
