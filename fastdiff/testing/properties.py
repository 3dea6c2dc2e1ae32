"""The properties of an op: each a function of (subject, example) that raises AssertionError, and returns the errors it measured."""

import warnings
from collections.abc import Callable
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ..core.backend import use_backend
from ..core.case import Array, Case
from ..core.contract import REGISTRY, public
from .budget import error
from .malformed import certain, raised
from .poison import guarded, patched, recorded
from .strategies import DTYPES, batch_axis, contiguous, lay_out

# The budget of 2 is for forward and backward passes. Derivatives beyond are written in plain PyTorch, in an order of our own, that may
# round a few times more than autograd's; a wrong formula is still far outside.
HIGHER = 32


class Refused(Exception):
    """The backend under test does not take this call."""


@dataclass(frozen=True)
class Subject:
    """A function under test, the meaning it is held to (same arguments, plain PyTorch, any dtype), and its contracts if it has any."""

    name: str
    function: Callable
    meaning: Callable
    case: Case
    contracts: tuple = ()
    backend: str | None = None

    def __str__(self):
        return f"{self.name}-{self.backend}" if self.backend else self.name

    @contextmanager
    def forced(self):
        """Its backend is in force; Refused where that backend refuses."""
        try:
            with use_backend(self.backend) if self.backend else nullcontext():
                yield
        except RuntimeError as problem:
            if self.backend and "no backend takes this call" in str(problem):
                raise Refused(str(problem)) from problem
            raise


def by_reference(function, contracts):
    """`function` with autograd through the references: no derivative rule, no kernel."""

    def meaning(**arguments):
        with ExitStack() as stack:
            stack.enter_context(use_backend("reference"))
            for c in contracts:
                stack.enter_context(patched(c, _backward=None))
            return function(**arguments)

    return meaning


def folder(name):
    """The contracts of the op folder that has this public function."""
    return tuple(c for c in REGISTRY.values() if name in c.cases())


def subjects(device="cpu", names=None, backends=None):
    """(Subject, None) for each op and backend that can run on `device`, (Subject, reason) for each that cannot."""
    ops = public()
    for name in names or sorted(ops):
        (function, case), contracts = ops[name], folder(name)
        rows = {}
        for b in (b for c in contracts for b in c.backends):
            why = b.unavailable or (None if device in b.devices else f"runs on {' and '.join(b.devices)}")
            rows[b.name] = rows.get(b.name) or why
        for backend, why in rows.items():
            if backends is None or backend in backends:
                meaning = case.reference or by_reference(function, contracts)
                yield Subject(name, case.taking(function), case.taking(meaning), case, contracts, backend), why


def dtypes(subject):
    """The dtypes its backend takes."""
    rows = [b for c in subject.contracts for b in c.backends if b.name == subject.backend]
    return tuple(d for d in (*DTYPES, torch.float64) if all(b.dtypes is None or d in b.dtypes for b in rows)) if rows else DTYPES


# Ways to run a function on an example; each gives name -> tensor

def _tuple(y):
    return tuple(y) if isinstance(y, tuple | list) else (y,)


def _named(outs):
    return {f"output {i}" if len(outs) > 1 else "output": y for i, y in enumerate(outs)}


def _leaves(example, arguments):
    """The arguments with a gradient, as leaves that record one; they take their places in `arguments`."""
    names = example.differentiable()
    arguments.update({name: arguments[name].detach().requires_grad_() for name in names})
    return {name: arguments[name] for name in names}


def forward(function, example, dtype=None):
    with torch.no_grad():
        return _named(_tuple(function(**example.arguments(dtype))))


def reverse(function, example, dtype=None, arguments=None, cotangents=None):
    """Outputs and first-order gradients."""
    arguments = arguments or example.arguments(dtype)
    leaves = _leaves(example, arguments)
    outs = _tuple(function(**arguments))
    cotangents = cotangents or example.cotangents(outs)
    pairs = [(y, dy) for y, dy in zip(outs, cotangents, strict=True) if y.requires_grad]
    grads = [None] * len(leaves)
    if pairs:
        grads = torch.autograd.grad([y for y, _ in pairs], list(leaves.values()), [dy for _, dy in pairs], allow_unused=True)
    return _named([y.detach() for y in outs]) | _gradients(leaves, grads)


def _gradients(leaves, grads, mark="gradient of"):
    """An absent gradient is 0."""
    return {f"{mark} {name}": torch.zeros_like(x) if g is None else g for (name, x), g in zip(leaves.items(), grads, strict=True)}


def reverse_twice(function, example, dtype=None):
    """Gradients of a random weighting of the gradients."""
    arguments = example.arguments(dtype)
    leaves = _leaves(example, arguments)
    outs = _tuple(function(**arguments))
    cotangents = [dy.requires_grad_(dy.is_floating_point()) for dy in example.cotangents(outs)]
    pairs = [(y, dy) for y, dy in zip(outs, cotangents, strict=True) if y.requires_grad]
    if not pairs:
        return {}
    inputs = leaves | {f"cotangent {i}": dy for i, (_, dy) in enumerate(pairs)}
    grads = torch.autograd.grad([y for y, _ in pairs], list(leaves.values()), [dy for _, dy in pairs], create_graph=True, allow_unused=True)
    grads = [g for g in grads if g is not None and g.requires_grad]
    if not grads:
        return {}
    weights = replace(example, seed=example.seed + 7).cotangents(grads)
    second = torch.autograd.grad(grads, list(inputs.values()), weights, allow_unused=True)
    return _gradients(inputs, second, "second-order gradient of")


def tangents(function, example, dtype=None):
    """Outputs' tangents along a random direction (torch.func.jvp, which takes no expanded inputs)."""
    example = replace(example, layouts={k: "offset" if kind == "expanded" else kind for k, kind in example.layouts.items()})
    arguments = example.arguments(dtype)
    names = example.differentiable()
    if not names:
        return {}
    primals = tuple(arguments[name] for name in names)
    _, dots = torch.func.jvp(lambda *xs: _tuple(function(**arguments | dict(zip(names, xs, strict=True)))), primals,
                             example.cotangents(primals))
    return {f"tangent of {name}": dot for name, dot in _named(dots).items()}


def mapped(function, example, dtype=None, *, loop=False, gradients=False):
    """Two calls at once by torch.vmap over some of the tensor arguments (by a loop, with loop=True)."""
    calls = [replace(example, seed=example.seed + i).arguments(dtype) for i in range(2)]
    names = example.tensors()
    axes = {name: (example.seed >> i) % 3 - 1 if calls[0][name].dim() else 0 for i, name in enumerate(names)}
    axes = {name: axis if axis >= 0 else None for name, axis in axes.items()}
    if all(axis is None for axis in axes.values()):
        axes[names[0]] = 0

    def one(*tensors):
        arguments = calls[0] | dict(zip(names, tensors, strict=True))
        if not gradients:
            return _tuple(function(**arguments))
        wanted = example.differentiable()
        outs, pull = torch.func.vjp(lambda *xs: _tuple(function(**arguments | dict(zip(wanted, xs, strict=True)))),
                                    *(arguments[name] for name in wanted))
        return pull(tuple(torch.ones_like(y) for y in outs))

    if loop:
        each = [one(*(calls[i if axes[name] is not None else 0][name] for name in names)) for i in range(2)]
        outs = [torch.stack(ys) for ys in zip(*each, strict=True)]
    else:
        stacked = (calls[0][n] if axes[n] is None else torch.stack([c[n] for c in calls], axes[n]) for n in names)
        outs = torch.vmap(one, in_dims=tuple(axes[name] for name in names))(*stacked)
    what = "mapped gradient" if gradients else "mapped output"
    return {f"{what} {i}": y for i, y in enumerate(outs)}


def _within(subject, example, way, *, meant=None, function=None, times=2):
    """The errors of our function run in this way, each within its budget."""
    with subject.forced():
        ours = way(function or subject.function, example)
    plain_dtype = torch.float32 if example.dtype == torch.float64 else None

    def run(e, dtype, meaning=subject.meaning):
        return (meant or way)(meaning, e, dtype)

    plain, exact = run(example, plain_dtype), run(example, torch.float64)
    largest = max((x[x.isfinite()].abs().max().item() for x in exact.values() if x.isfinite().any()), default=0.0)
    errors = [error(name, ours[name], plain[name], exact[name], times=times, largest=largest) for name in exact]
    if any(e.ratio > 1 for e in errors):
        nearby, fused = [], subject.case.fused and subject.case.taking(subject.case.fused)
        for e in (example, *(replace(example, nudge=i) for i in range(1, 17))):
            truth = run(e, torch.float64)
            nearby += [(run(e, plain_dtype, f), truth) for f in (subject.meaning, way in (forward, reverse) and fused) if f]
        pairs = {name: [(p[name], e[name]) for p, e in nearby] for name in exact}
        errors = [error(name, ours[name], plain[name], exact[name], pairs[name], times, largest) for name in exact]
    for e in errors:
        assert e.ratio <= 1, f"{e.tensor}: error {e.error:.3g} is over the limit {e.limit:.3g}"
    return errors


def same_bits(a, b):
    size = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.contiguous().view(size), b.contiguous().view(size))


def _assert_same(ours, other, text):
    for name, y in ours.items():
        assert same_bits(y, other[name]), f"{name} {text}"


# The properties

def values(subject, example):
    return _within(subject, example, forward)


def gradients(subject, example):
    return _within(subject, example, reverse)


def second_order(subject, example):
    return _within(subject, example, reverse_twice, times=HIGHER)


def forward_mode(subject, example):
    return _within(subject, example, tangents, times=HIGHER)


def vmap(subject, example):
    """torch.vmap of the op, and of its gradients, whose sums then run over more rows in another order."""
    errors = []
    for kind in (False, True) if example.differentiable() else (False,):
        way = partial(mapped, gradients=kind)
        errors += _within(subject, example, way, meant=partial(way, loop=True), times=4 if kind else 2)
    return errors


def numerical(subject, example):
    """gradcheck and gradgradcheck, reverse and forward mode, in float64."""
    if not example.differentiable():
        return
    example = contiguous(replace(example, dtype=torch.float64))
    arguments = example.arguments()
    leaves = _leaves(example, arguments)

    def function(*xs):
        outs = _tuple(subject.function(**arguments | dict(zip(leaves, xs, strict=True))))
        return tuple(y.masked_fill(y.isinf(), 0.0) for y in outs)  # the log-sum-exp of nothing is -inf, without a difference quotient

    with subject.forced():
        assert torch.autograd.gradcheck(function, tuple(leaves.values()), check_forward_ad=True, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(function, tuple(leaves.values()), fast_mode=True)


def fake(subject, example):
    """Shapes, dtypes and strides without data are those with data."""
    arguments = example.arguments()
    with subject.forced():
        real = _tuple(subject.function(**arguments))
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        shapes = {name: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
        faked = _tuple(subject.function(**shapes))
    for i, pair in enumerate(zip(real, faked, strict=True)):
        is_real, is_fake = ((tuple(y.shape), y.dtype, y.stride(), y.device) for y in pair)
        assert is_real == is_fake, f"output {i} is {is_real}, its fake {is_fake}"


def _calls(subject, example):
    """(contract, args, outs) of every run that a forward and backward pass makes."""
    with recorded(subject.contracts) as calls, subject.forced():
        reverse(subject.function, example)
        forward(subject.function, example)
    return [call for call in calls if not any(isinstance(a, torch.Tensor) and a.is_meta for a in call[1])]


def registered(subject, example):
    """torch.library.opcheck of every op that runs."""
    # opcheck takes sum((n - 1) stride) for the size of a tensor that it copies: empty ones get strides with which that is not negative
    dense = lambda x: x.clone(memory_format=torch.contiguous_format) if x.numel() else x.new_empty_strided(x.shape, (0,) * x.dim())
    seen = set()
    for contract, args, _ in _calls(subject, example):
        if contract.name not in seen:
            seen.add(contract.name)
            copy = lambda x: dense(x.detach()).requires_grad_(x.is_floating_point())
            args = tuple(copy(a) if isinstance(a, torch.Tensor) else a for a in args)
            with subject.forced(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.library.opcheck(contract.op, args)


def compiled(subject, example):
    """torch.compile(fullgraph=True, dynamic=True), forward and backward."""
    torch._dynamo.reset()
    function = torch.compile(subject.function, fullgraph=True, dynamic=True, backend="aot_eager")
    return _within(subject, example, reverse, function=function)


def exported(subject, example):
    """torch.export.export, and the exported program."""

    class Module(torch.nn.Module):
        def forward(self, **arguments):
            return subject.function(**arguments)

    def function(**arguments):
        return torch.export.export(Module(), (), arguments, strict=False).module()(**arguments)

    return _within(subject, example, forward, function=function)


def written(subject, example):
    """Every output element is written, and nothing beside the outputs."""
    runs = []
    for fill in (7.0, -3.0):
        with guarded(subject.contracts, fill), subject.forced():
            runs.append(forward(subject.function, example) | reverse(subject.function, example))
    _assert_same(*runs, "depends on what its memory held before: an element is not written, or added to")


def unharmed(subject, example):
    """Inputs and cotangents, and the memory about them, are as before."""
    arguments = example.arguments()
    cotangents = example.cotangents(_tuple(subject.meaning(**example.arguments())))
    inputs = {name: x for name, x in arguments.items() if isinstance(x, torch.Tensor)} | {f"dy {i}": x for i, x in enumerate(cotangents)}

    def memory(x):
        return torch.empty(0, dtype=torch.uint8, device=x.device).set_(x.untyped_storage())

    before = {name: memory(x).clone() for name, x in inputs.items()}
    with subject.forced():
        reverse(subject.function, example, arguments=dict(arguments), cotangents=cotangents)
    for name, x in inputs.items():
        assert torch.equal(memory(x), before[name]), f"{name} was written to"


def repeatable(subject, example):
    with subject.forced():
        _assert_same(reverse(subject.function, example), reverse(subject.function, example), "has other bits in a second run")


def thread_count(subject, example):
    """The same bits with 1, 2 and 4 threads."""
    if subject.backend == "reference":
        return  # PyTorch's own matrix products cut their sums by threads
    before, runs = torch.get_num_threads(), []
    try:
        for n in (1, 2, 4):
            torch.set_num_threads(n)
            with subject.forced():
                runs.append(reverse(subject.function, example))
    finally:
        torch.set_num_threads(before)
    for run, n in zip(runs[1:], (2, 4), strict=True):
        _assert_same(runs[0], run, f"has other bits with {n} threads than with 1")


def batch_independence(subject, example):
    """A sample's results keep their bits when the other samples turn NaN. (Alone, a sample may take another plan: `values` bounds that.)"""
    axis, names = batch_axis(example)
    if axis is None or subject.case.dims[axis].high < 2:
        return
    example = replace(example, dims=example.dims | {axis: max(2, example.dims[axis])})
    arguments = example.arguments()
    others = dict(arguments)
    for name in names:
        if arguments[name].is_floating_point():
            x = arguments[name].clone()
            x[1:] = torch.nan
            kind = "contiguous" if example.layouts[name] == "expanded" else example.layouts[name]
            arguments[name], others[name] = (lay_out(y, kind, x.device) for y in (arguments[name], x))
    with subject.forced():
        both = [reverse(subject.function, example, arguments=a) for a in (arguments, others)]
    mine = [{k: y[:1] for k, y in r.items() if k.startswith("output") or k.removeprefix("gradient of ") in names} for r in both]
    _assert_same(*mine, "of a sample changes with the other samples")


def eager_entry(subject, example):
    """The native eager entries give the bits and strides of the long way."""
    entries = [c for c in subject.contracts if any(c._entries)]
    with torch.no_grad(), subject.forced():
        short = _tuple(subject.function(**example.arguments()))
        with ExitStack() as stack:
            for c in entries:
                stack.enter_context(patched(c, _entries=()))
            long = _tuple(subject.function(**example.arguments()))
    for i, (a, b) in enumerate(zip(short, long, strict=True)):
        assert same_bits(a, b), f"output {i} of the eager entry has other bits"
        assert a.stride() == b.stride(), f"output {i} of the eager entry has strides {a.stride()}, the long way's are {b.stride()}"


def refusals(subject, example):
    """A backend that gives no reason runs the call; one that gives a reason refuses with it when it is forced."""
    for contract, args, _ in _calls(subject, example):
        args = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)
        for backend in contract.backends:
            why = backend.why_not(args)
            with use_backend(backend.name), torch.no_grad():
                try:
                    contract.run(*args)
                    said = None
                except RuntimeError as problem:
                    said = str(problem)
            if why is None:
                assert said is None, f"{contract.name}: {backend.name} gives no reason, but fails: {said}"
            else:
                assert said and why in said, f"{contract.name}: {backend.name} says {why!r}, but forcing it gives {said!r}"


def bad_arguments(subject, example):
    """Each malformed call raises ValueError or TypeError that names the op and the argument."""
    for bad in certain(subject, example):
        problem = raised(subject, bad)
        assert isinstance(problem, ValueError | TypeError), f"{bad}: wants ValueError or TypeError, got {problem!r}"
        text = str(problem)
        names = (subject.name, *(c.name for c in subject.contracts))
        assert any(text.startswith(f"{name}:") for name in names), f"{bad}: the message does not begin with the op: {text}"
        words = set(text.replace(",", " ").replace("[", "_").replace("]", "").split())
        assert set(bad.arguments) & words, f"{bad}: the message does not name the argument: {text}"


def autocast(subject, example):
    """Under autocast an op that casts gives what it gives on cast inputs; another is as without autocast."""
    example = replace(example, dtype=torch.float32)
    casts = any(contract.autocast for contract, *_ in _calls(subject, example)[:1])
    names = [name for name, spec in example.specs().items() if isinstance(spec, Array)]

    def cast(**arguments):
        return subject.function(**{k: x.to(torch.bfloat16) if k in names and casts else x for k, x in arguments.items()})

    def under(**arguments):
        with torch.autocast(example.device, dtype=torch.bfloat16):
            return subject.function(**arguments)

    with subject.forced():
        _assert_same(reverse(cast, example), reverse(under, example), "differs under autocast")


@dataclass(frozen=True)
class Property:
    """check(subject, example). ours: asks for contracts. share: of the examples that it gets, less than 1 for what is slow.

    tiny: takes few elements and plain values, in float64. once: says the same on every backend.
    """

    check: Callable
    ours: bool = False
    share: float = 1.0
    tiny: bool = False
    once: bool = False

    @property
    def name(self):
        return self.check.__name__

    def count(self, examples):
        return max(1, int(examples * self.share))


PROPERTIES = (
    Property(values), Property(gradients), Property(second_order), Property(forward_mode), Property(vmap), Property(repeatable),
    Property(unharmed), Property(batch_independence), Property(thread_count, ours=True), Property(written, ours=True),
    Property(fake, ours=True), Property(eager_entry, ours=True), Property(refusals, ours=True), Property(autocast, ours=True),
    Property(bad_arguments, ours=True, share=0.2), Property(numerical, share=0.2, tiny=True),
    Property(registered, ours=True, share=0.1, once=True), Property(compiled, share=0.2), Property(exported, share=0.2))
