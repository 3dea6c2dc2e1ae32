"""Guarded outputs: what a kernel leaves unwritten, or writes beside its outputs, shows."""

from contextlib import ExitStack, contextmanager

import torch
from torch._subclasses.fake_tensor import FakeTensor

GUARD = 256


@contextmanager
def patched(contract, **attributes):
    """Attributes of a contract's instance replaced within the block."""
    before = {name: getattr(contract, name) for name in attributes}
    for name, value in attributes.items():
        setattr(contract, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(contract, name, value)


@contextmanager
def recorded(contracts):
    """Yields a list that gathers (contract, args, outs) of every run within the block."""
    calls = []

    def wrap(contract, outputs):
        def record(*args):
            outs = outputs(*args)
            calls.append((contract, args, outs))
            return outs
        return record

    with ExitStack() as stack:
        for c in contracts:
            stack.enter_context(patched(c, outputs=wrap(c, c.outputs), _entries=()))
        yield calls


@contextmanager
def guarded(contracts, fill):
    """Within the block outputs are allocated amid guard memory, all of it holding `fill`; on leaving, the guards must still hold it.

    Raises AssertionError when they do not. Two runs with different fills give the same bits only if every element is written.
    """
    kept = []

    def guard(contract, y):
        if isinstance(y, FakeTensor) or y.is_meta or not y.dtype.is_floating_point:
            return y
        span = 1 + sum((n - 1) * s for n, s in zip(y.shape, y.stride(), strict=True)) if y.numel() else 0
        memory = torch.full((span + 2 * GUARD,), fill, dtype=y.dtype, device=y.device)
        kept.append((contract.name, memory, span))
        return memory.as_strided(y.shape, y.stride(), GUARD)

    def wrap(contract, outputs):
        def allocate(*args):
            outs = outputs(*args)
            return tuple(guard(contract, y) for y in outs) if isinstance(outs, tuple) else guard(contract, outs)
        return allocate

    with ExitStack() as stack:
        for c in contracts:
            stack.enter_context(patched(c, outputs=wrap(c, c.outputs), _entries=()))
        yield
    for name, memory, span in kept:
        for side, edge in (("before", memory[:GUARD]), ("after", memory[GUARD + span:])):
            assert torch.equal(edge, torch.full_like(edge, fill)), f"{name} wrote {side} the memory of an output"
