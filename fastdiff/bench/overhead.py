"""What a call costs before any work: ops on 16-element tensors beside scaled_dot_product_attention on tiny ones."""

import inspect
from functools import partial
from itertools import product
from math import prod
from statistics import median

import torch
import torch.nn.functional as F

from ..core.case import Array, Dim, Integers, OneOf
from ..explain import backend, calls
from .inputs import make
from .timer import Budget, interleave

ELEMENTS = 16


def arrays(arguments):
    """The floating arrays, or the integer ones of an op that takes no others."""
    kinds = ([a for a in arguments.values() if isinstance(a, kind)] for kind in (Array, Integers))
    return next(filter(None, kinds))


def tiny(case):
    """Arguments of the case whose arrays come closest to 16 elements each."""
    values = [d.values if isinstance(d, OneOf) else [n for n in (1, 2, 4) if d.low <= n <= d.high] or [d.low] for d in case.dims.values()]
    # A mode beyond its first value is taken only for what it does to the sizes of an axis, never for a mask or an option.
    values = [v if isinstance(d, Dim) or isinstance(v[0], tuple) else v[:1] for v, d in zip(values, case.dims.values(), strict=True)]
    made = (case.arguments(**dict(zip(case.dims, chosen, strict=True))) for chosen in product(*values))
    return min(made, key=lambda arguments: sum(abs(ELEMENTS - prod(a.shape)) for a in arrays(arguments)))


def bare(function, arguments):
    """function with these arguments as one would write the call: by position where that is possible, defaults left away."""
    args, kwargs = [], {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY:
            if name in arguments and arguments[name] is not parameter.default:
                kwargs[name] = arguments[name]
        else:
            args.append(arguments[name])
    return partial(function, *args, **kwargs)


def measure(ops, chunk=50, budget=None):
    """One row per op of {name: (function, Case)}: medians in microseconds and the ratio, `chunk` calls per sample, interleaved."""
    budget = budget or Budget(pairs=100, least=0.3 * len(ops), most=3.0 * len(ops))
    q = torch.randn(1, 1, 4, 4)
    made = {"sdpa": partial(F.scaled_dot_product_attention, q, q, q)}
    backends = {}
    for name, (function, case) in ops.items():
        arguments = make(tiny(case), "float32", "cpu")
        made[name] = partial(case.taking(function), **arguments) if case.gather else bare(function, arguments)
        contract, args = calls(case.taking(function), **arguments)[0]
        backends[name] = backend(contract, args)[0].name

    def repeat(call):
        def run(_):
            for _ in range(chunk):
                call()

        return run

    samples = interleave({name: repeat(call) for name, call in made.items()}, budget)
    us = {name: median(times) / chunk * 1e6 for name, times in samples.items()}
    return [{"op": name, "backend": backends[name], "ours_us": us[name], "sdpa_us": us["sdpa"], "ratio": us["sdpa"] / us[name]}
            for name in ops]
