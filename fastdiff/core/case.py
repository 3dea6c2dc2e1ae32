"""Cases: what inputs an op takes, how much work they are, and at which sizes it is timed. Read by testing and bench alike."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Dim:
    """A size between `low` and `high` inclusive."""

    low: int
    high: int


@dataclass(frozen=True)
class OneOf:
    """One of the listed values; the first is what a benchmark row takes unless it says otherwise."""

    values: tuple

    def __init__(self, *values):
        object.__setattr__(self, "values", values)


@dataclass(frozen=True)
class Array:
    """A floating tensor of this shape. `masks` lets -inf stand in it (an additive mask); `dtype` fixes its dtype whatever the run's;
    `scale` is its standard deviation in benchmarks (a weight's keeps scores moderate). within: (low, high) between which its values lie.
    number: a Python number may stand in its place. `either`: float32 is legal beside a narrower run. `last`: benchmarks lay it out
    channels last.
    """

    shape: tuple
    grad: bool = True
    masks: bool = False
    dtype: str | None = None
    scale: float = 1.0
    within: tuple | None = None
    number: bool = False
    either: bool = False
    last: bool = False


@dataclass(frozen=True)
class Integers:
    """A tensor of this shape and integer dtype with values in [low, high]. widths: the dtypes that may stand in place of its own."""

    shape: tuple
    low: int
    high: int
    dtype: str = "int64"
    widths: tuple = ("int64",)


def _no_work(*_, **arguments):
    return 0


@dataclass(frozen=True)
class Case:
    """dims: name -> Dim or OneOf, drawn together. arguments(**dims): the call's keyword arguments, Array and Integers for its tensors.

    flops(**arguments) and bytes(element_size, **arguments): the least work of a call, from shapes alone (only benchmarks need them).
    batched: the tensor arguments with a leading batch axis along which samples are independent. heads: those with a second axis along
    which heads are. linear: the op is linear in its tensors. bench: row name -> dims. fused: PyTorch's own fused op for the same
    arguments and results, where it has one: its error is plain PyTorch's too. reference: the function's meaning, where that is more than
    its contracts' references under it. gather: the arguments that the function takes as a tuple of two (or None), here name_0 and name_1.
    any_rank: the tensor arguments with any number of leading axes.
    """

    dims: dict
    arguments: Callable
    flops: Callable = _no_work
    bytes: Callable = _no_work
    batched: tuple = ()
    heads: tuple = ()
    linear: bool = False
    backward_flops: float = 2.0
    bench: dict = field(default_factory=dict)
    fused: Callable | None = None
    reference: Callable | None = None
    gather: tuple = ()
    any_rank: tuple = ()

    def taking(self, function):
        """`function` with the keyword arguments that `arguments` makes."""
        if not self.gather:
            return function

        @functools.wraps(function)
        def call(**arguments):
            for name in self.gather:
                pair = arguments.pop(f"{name}_0"), arguments.pop(f"{name}_1")
                arguments[name] = None if pair[0] is None and pair[1] is None else pair
            return function(**arguments)

        return call

    def sizes(self, **given):
        """A full set of dims: `given`, and for the rest the first value of a OneOf or the lowest of a Dim."""
        rest = {k: d.values[0] if isinstance(d, OneOf) else d.low for k, d in self.dims.items()}
        unknown = set(given) - set(rest)
        if unknown:
            raise ValueError(f"case has no dims {sorted(unknown)}; it has {sorted(rest)}")
        return rest | given
