"""A model before and after `accelerate`, on an example: errors, times, memory, and which replacements are worth it."""

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


def not_faster(before, after):
    """Whether seconds after, beside seconds before, call for the original: their medians and their least not 3 % below, which noise is."""
    return median(after) > 0.97 * median(before) and min(after) > 0.97 * min(before)


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


def _gradients(call, module, arguments, keywords):
    """The gradients of a weighted sum of the outputs of call(*arguments, **keywords), of inputs and of module's parameters; or None."""
    fresh = lambda x: x.detach().clone().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
    arguments, keywords = tree_map(fresh, (arguments, keywords))
    wanted = [t for t in (*tree_leaves((arguments, keywords)), *module.parameters()) if isinstance(t, torch.Tensor) and t.requires_grad]
    torch.manual_seed(0)
    with torch.enable_grad():
        outs = [t for t in tree_leaves(call(*arguments, **keywords)) if isinstance(t, torch.Tensor) and t.requires_grad]
        if not outs or not wanted:
            return None
        loss = sum((t * torch.linspace(-1, 1, t.numel(), dtype=t.dtype, device=t.device).view(t.shape)).sum() for t in outs)
        return torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)


def _backward_error(plain, fast, module, arguments, keywords):
    """The relative error of the gradients, or None where plain has none."""
    if isinstance(module, torch.nn.parallel.DistributedDataParallel):
        return None  # its reducer would wait for the rest of the backward
    try:
        before = _gradients(plain, module, arguments, keywords)
    except RuntimeError:  # no derivative
        return None
    return None if before is None else difference(before, _gradients(fast, module, arguments, keywords))[1]


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

    def side(which):
        for swap in swaps:
            swap[0].__class__ = swap[which]

    def run(which):
        """The model's output and its seconds, with the modules plain (1) or replaced (2)."""
        side(which)
        torch.manual_seed(0)
        wait()
        start = clock()
        out = model(*arguments, **keywords)
        wait()
        return out, clock() - start

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
        sizes = {}
        for group in groups():
            with ExitStack() as hooks:
                for row, swap in group:
                    hooks.enter_context(_compared(row, *swap, sizes))
                run(1)
        reasons = {}
        for group in groups():
            with ExitStack() as hooks:
                timers = [hooks.enter_context(_timed(swap[0], wait, clock)) for _, swap in group]
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
                    alike.setdefault((row.kind, sizes.get(id(row))), []).append((row, before, after))
            for rows in alike.values():  # modules of one class and size are judged together: one by one, noise would decide
                before, after = ([sum(run) for run in zip(*(row[i] for row in rows), strict=True)] for i in (1, 2))
                if not_faster(before, after):
                    times = f"{1e3 * median(before):.3f} ms as it is, {1e3 * median(after):.3f} ms replaced"
                    many = f" for {len(rows)} of its kind" if len(rows) > 1 else ""
                    reasons |= {id(row): f"not faster at the example's sizes: {times}{many}" for row, *_ in rows}
        leave(reasons)
        report.error_forward = difference(run(1)[0], run(2)[0])[1]
        call = lambda which: lambda *a, **k: (side(which), model(*a, **k))[1]
        report.error_backward = _backward_error(call(1), call(2), model, arguments, keywords)
        times = [(run(1)[1], run(2)[1]) for _ in range(RUNS)]
        report.time_before, report.time_after = map(median, zip(*times, strict=True))
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
def _compared(row, module, plain, fast, sizes):
    """Within, each call of the plain module also runs the replacement on the same input and notes the largest errors in `row`, and
    in `sizes` the shapes of its inputs and parameters."""

    def call(kind):
        def forward(*arguments, **keywords):
            module.__class__ = kind
            return module.forward(*arguments, **keywords)

        return forward

    def after(m, arguments, keywords, out):
        try:
            errors = (difference(out, call(fast)(*arguments, **keywords))[1],
                      _backward_error(call(plain), call(fast), m, arguments, keywords))
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
def _timed(module, wait, clock):
    """A list that gets the seconds of every call of the module."""
    seconds, started = [], []

    def enter():
        wait()
        started.append(clock())

    def leave():
        wait()
        seconds.append(clock() - started.pop())

    with _around(module, enter, leave):
        yield seconds
