"""Malformed calls, derived from a Case: in a table for the property tests, at random in a child process for `verify --malformed`."""

import inspect
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from ..core.case import Array, Dim, Integers, OneOf
from .budget import error
from .strategies import EDGES, LAYOUTS, MASKS, VALUES, Example, batch_axis, followed, shrink

NOT_TENSORS = {"3": 3, "2.5": 2.5, "'text'": "text", "a list": [1.0, 2.0],
               "a numpy array": np.zeros((2, 3), np.float32), "an object": object()}
# Values that no option of the type takes, by the type of a value that it does take.
NOT_OPTIONS = {
    bool: {"'yes'": "yes", "None": None, "2.5": 2.5, "an object": object(), "[]": []},
    int: {"'8'": "8", "None": None, "2.5": 2.5, "-1": -1, "an object": object()},
    float: {"'0.5'": "0.5", "1j": 1j, "[0.5]": [0.5], "an object": object(), "an array": np.ones(3)},
    str: {"'zzz'": "zzz", "3": 3, "None": None, "b'pqc'": b"pqc", "['pqc']": ["pqc"]},
    tuple: {"'2, 2'": "2, 2", "None": None, "2.5": 2.5, "(-1, ...)": -1, "(2.5, ...)": 2.5, "('2', ...)": "2", "5 ints": (1,) * 5, "()": (),
            "nested": ((1, 1),), "an object": object(), "an array": np.ones(2)}}
# Values that may be legal beside the other arguments: what comes back must then be the reference's.
DOUBTFUL_OPTIONS = {
    bool: {"1": 1, "0": 0},
    int: {"0": 0, "True": True, "2**40": 2**40, "2**62": 2**62},
    float: {"nan": float("nan"), "inf": float("inf"), "0.0": 0.0, "-1.0": -1.0, "2": 2, "True": True},
    str: {}, tuple: {"(0, ...)": 0, "(1, ...)": 1, "(2**40, ...)": 2**40, "(2**62, ...)": 2**62, "(True, ...)": True}}


@dataclass(frozen=True)
class Mutation:
    """One argument's replacement. certain: no call with it is legal. beside: arguments that it no longer agrees with."""

    argument: str
    text: str
    make: Callable
    certain: bool = True
    beside: tuple = ()


@dataclass(frozen=True)
class Call:
    """A call's keyword arguments; `arguments` are those of which a refusal has to name one."""

    arguments: tuple
    text: str
    kwargs: dict
    certain: bool

    def __str__(self):
        return self.text


def _tensor_arguments(subject):
    return {a.name for c in subject.contracts for a in c.op._schema.arguments if "Tensor" in str(a.type)}


def _optional(subject):
    named = {a.name for c in subject.contracts for a in c.op._schema.arguments if "Optional" in str(a.type)}
    return named | {p.name for p in inspect.signature(subject.function).parameters.values() if p.default is None}


def mutations(subject, example):
    """Every replacement of one argument that is known to be wrong, and some that may be."""
    specs, case = example.specs(), subject.case
    made = example.arguments()
    tensors, optional = _tensor_arguments(subject), _optional(subject)
    arrays = [name for name, spec in specs.items() if isinstance(spec, Array)]
    axes = followed(case, example.dims)
    largest = max((n for name in example.tensors() for n in made[name].shape), default=0)
    out = []
    for name, spec in specs.items():
        def add(text, make, certain=True, beside=(), name=name):
            out.append(Mutation(name, f"{name} = {text}", make, certain, beside))

        if not isinstance(spec, Array | Integers) and name not in tensors:
            _options(add, made[name], _kinds(case, name, made[name]))
            continue
        numbers = isinstance(spec, Array) and spec.number
        for text, value in NOT_TENSORS.items():
            add(text, lambda value=value: value, not (numbers and isinstance(value, int | float)))
        if not isinstance(spec, Array | Integers):
            continue
        x = made[name]
        if name not in optional:
            add("None", lambda: None)
        add("of 8 dimensions", lambda x=x: x.reshape((1,) * (8 - x.dim()) + x.shape), name not in case.any_rank)
        integers = isinstance(spec, Integers)
        wrong = (torch.int32, torch.float32, torch.bool) if integers else (torch.int64, torch.bool, torch.complex64, torch.uint8)
        if integers:
            wrong = [d for d in wrong if str(d).removeprefix("torch.") not in spec.widths]
        for dtype in wrong:
            add(f"of {dtype}", lambda x=x, dtype=dtype: torch.ones(x.shape, dtype=dtype, device=x.device))
        if isinstance(spec, Array):
            add("sparse", lambda x=x: x.to_sparse())
            if len(arrays) > 1:
                other = torch.float16 if x.dtype == torch.float32 else torch.float32
                strict = [a for a in arrays if specs[a].dtype is None and not specs[a].either]
                disagrees = not spec.either and (spec.dtype is not None or len(strict) > 1)
                add(f"of {other} beside others", lambda x=x, other=other: x.to(other), disagrees)
        elif x.numel():
            for text, value in (("below its range", spec.low - 1), ("above its range", spec.high + 1)):
                if torch.iinfo(x.dtype).min <= value <= torch.iinfo(x.dtype).max:
                    add(text, lambda x=x, value=value: torch.full_like(x, value))
        if len(example.tensors()) > 1 and x.numel():
            add("on meta", lambda x=x: x.to("meta"))
        for axis in range(x.dim()):
            shared = tuple({other for (other, _), dim in axes.items() if other != name and dim == axes.get((name, axis))})
            for size in (largest + 2, x.shape[axis] + 1, 1, 0):
                shape = (*x.shape[:axis], size, *x.shape[axis + 1:])
                certain = bool(shared) and size == largest + 2 and x.shape[axis] != 1  # the others' 1 may be broadcast
                add(f"of shape {shape} instead of {tuple(x.shape)}", lambda x=x, shape=shape: _of_shape(x, shape), certain, shared)
        for text, make in {"with one more dimension": lambda x: x.unsqueeze(0), "without its first": lambda x: x.sum(0).to(x.dtype),
                           "flat": lambda x: x.reshape(-1), "with its axes reversed": lambda x: x.permute(tuple(reversed(range(x.dim())))),
                           "NaN": lambda x: torch.full_like(x, torch.nan) if x.is_floating_point() else x,
                           "a negative view": lambda x: torch._neg_view(x) if x.is_floating_point() else x,
                           "without storage": lambda x: torch._efficientzerotensor(x.shape, dtype=x.dtype, device=x.device),
                           "overlapping": lambda x: x.new_ones(sum(x.shape) + 1).as_strided(x.shape, (1,) * x.dim())}.items():
            add(text, lambda x=x, make=make: make(x), False)
    return out


def _of_shape(x, shape):
    return (torch.ones if x.is_floating_point() else torch.zeros)(shape, dtype=x.dtype, device=x.device)


def _kinds(case, name, value):
    """Types of values the option takes."""
    dim = case.dims.get(name)
    known = [value, *(dim.values if isinstance(dim, OneOf) else ())]
    return {type(v) for v in known if v is not None}


def _options(add, value, kinds):
    for kind in kinds & set(NOT_OPTIONS):
        for certain, table in ((True, NOT_OPTIONS), (False, DOUBTFUL_OPTIONS)):
            for text, wrong in table[kind].items():
                if kind is tuple and "..." in text:
                    wrong = (wrong, *value[1:])
                add(text, lambda wrong=wrong: wrong, certain)


def certain(subject, example):
    """A Call for each mutation that no legal call has."""
    return [Call((m.argument, *m.beside), m.text, example.arguments() | {m.argument: m.make()}, True)
            for m in mutations(subject, example) if m.certain]


def raised(subject, call):
    """The exception of a call, or None when it returns."""
    try:
        with subject.forced():
            subject.function(**call.kwargs)
    except Exception as problem:
        return problem
    return None


# At random, in a child process

def sample(case, rng, limit):
    dims = {}
    for name, d in case.dims.items():
        edges = [e for e in EDGES if isinstance(d, Dim) and d.low <= e <= d.high]
        dims[name] = rng.choice(d.values) if isinstance(d, OneOf) else rng.choice([*edges, rng.randint(d.low, d.high)])
    dims = shrink(case, dims, limit)
    specs = case.arguments(**dims)
    return Example(case, dims, rng.choice((torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64)),
                   {name: rng.choice(LAYOUTS) for name, spec in specs.items() if isinstance(spec, Array | Integers)},
                   {name: rng.choice(VALUES + MASKS * spec.masks) for name, spec in specs.items() if isinstance(spec, Array)},
                   rng.randrange(1000))


def too_large(subject, rng, example):
    """A legal call whose results cannot be had: 2^36 samples or more, all in the same memory."""
    axis, names = batch_axis(example)
    kwargs = example.arguments()
    if axis is None or not all(kwargs[name].numel() for name in example.tensors()):
        return None
    B = 2 ** rng.randint(36, 44)
    kwargs |= {name: kwargs[name][:1].expand(B, *kwargs[name].shape[1:]) for name in names}
    return Call(names, f"{axis} = 2^{B.bit_length() - 1}", kwargs, True)


def generate(subject, seed):
    """One call, malformed by one or two mutations."""
    rng = random.Random(seed)
    example = sample(subject.case, rng, 4096)
    if rng.random() < 0.08 and (call := too_large(subject, rng, example)):
        return call
    every = mutations(subject, example)
    sure = [m for m in every if m.certain]
    chosen = [rng.choice(sure if rng.random() < 0.6 else every)]
    if rng.random() < 0.2:
        chosen.append(rng.choice([m for m in every if m.argument != chosen[0].argument] or every))
    kwargs = example.arguments()
    for m in chosen:
        kwargs[m.argument] = m.make()
    if rng.random() < 0.3:
        kwargs = {k: x.detach().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for k, x in kwargs.items()}
    # A second mutation can mend the first: sizes that disagree may agree again.
    return Call(tuple(m.argument for m in chosen), f"{' and '.join(m.text for m in chosen)} ({example})", kwargs,
                len(chosen) == 1 and chosen[0].certain)


def outcome(subject, call):
    """(word, detail): "clean" error, "legal" call equal to its reference, "unclean" error, or "silent" acceptance of a malformed call."""
    problem = None
    try:
        with subject.forced():
            outs = subject.function(**call.kwargs)
    except Exception as caught:
        problem = caught
    large = " = 2^" in call.text
    if isinstance(problem, ValueError | TypeError) or (large and isinstance(problem, RuntimeError | MemoryError)):
        return "clean", type(problem).__name__
    if problem is not None and call.certain:
        return "unclean", _short(problem)
    if call.certain:
        return "silent", "returned"
    return _against_reference(subject, call, problem, outs if problem is None else None)


def _short(problem):
    return f"{type(problem).__name__}: {str(problem)[:120]!r}"


def _against_reference(subject, call, problem, outs):
    """Judges a call that may be legal: it must do as its reference does."""
    wide = {k: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for k, x in call.kwargs.items()}
    try:
        plain, exact = subject.meaning(**call.kwargs), subject.meaning(**wide)
    except Exception as meant:
        if problem is not None:
            return ("clean", "as the reference") if type(meant) is type(problem) else ("unclean", _short(problem))
        return "silent", f"returned, where the reference says {_short(meant)}"
    if problem is not None:
        return "unclean", f"{_short(problem)}, where the reference returns"
    rows = zip(*(y if isinstance(y, tuple) else (y,) for y in (outs, plain, exact)), strict=True)
    for i, (y, p, e) in enumerate(rows):
        try:
            # A kernel does not read what is hidden, the reference multiplies it by 0: a NaN counts only where ours alone has it.
            y = torch.where(e.detach().isnan() & y.detach().isfinite(), e.detach().to(y.dtype), y.detach())
            measured = error(f"output {i}", y, p.detach(), e.detach())
        except AssertionError as problem:
            return "silent", str(problem)
        if measured.ratio > 8:  # the budget itself is not the matter here: a call must not mean something else
            return "silent", f"output {i}: error {measured.error:.3g} over the limit {measured.limit:.3g}"
    return "legal", "as the reference"


def limit_memory(more):
    """This process may take `more` bytes than now; an allocation beyond raises."""
    import resource

    with open("/proc/self/statm") as f:
        now = int(f.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + more, resource.getrlimit(resource.RLIMIT_AS)[1]))


def child(name, backend, start, stop, seed):
    """Makes calls start..stop and prints, for each, what it is and then what came of it."""
    from .properties import subjects  # it imports this module

    subject, _ = next(subjects(names=[name]))
    subject = replace(subject, backend=backend)
    torch.set_num_threads(2)
    limit_memory(4 << 30)
    for i in range(start, stop):
        call = generate(subject, seed * 1_000_003 + i)
        print(f"call\t{i}\t{call.text}", flush=True)
        word, detail = outcome(subject, call)
        print(f"done\t{word}\t{detail}", flush=True)


if __name__ == "__main__":
    child(sys.argv[1], sys.argv[2] or None, *map(int, sys.argv[3:]))
