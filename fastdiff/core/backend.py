"""Backends of a contract: rows tried in order on real tensors; a refusal is a sentence."""

import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from . import jit, native

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def _name(dtype):
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Backend:
    """One way to compute a contract.

    devices: device types it can run on. dtypes: of the first tensor (None: all). run(args, outs) writes every element of `outs`.
    refuse(*args): a sentence when these arguments are not for it, else None; asked after device and dtype fit. unavailable: a sentence
    when it cannot run in this process at all. plan(*args): what it would do, for explain().
    """

    name: str
    devices: tuple
    run: Callable
    dtypes: tuple | None = None
    refuse: Callable | None = None
    unavailable: str | None = None
    plan: Callable | None = None

    def why_not(self, args):
        """None when it takes these arguments, otherwise the reason."""
        x = args[0]
        if x.device.type not in self.devices:
            return f"runs on {' and '.join(self.devices)}, the tensors are on {x.device.type}"
        if self.unavailable:
            return self.unavailable
        if self.dtypes is not None and x.dtype not in self.dtypes:
            return f"takes {', '.join(map(_name, self.dtypes))}, the tensors are {_name(x.dtype)}"
        return self.refuse(*args) if self.refuse else None


def _native(device, name, dtypes, refuse, plan):
    kernel = native.op(device, name)
    why = native.WHY_NOT[device]
    return Backend(device, (device,), lambda args, outs: kernel(*args, *outs), dtypes, refuse, why and f"native library: {why}", plan)


def cpu(name, *, dtypes=FLOATS, refuse=None, plan=None):
    """The native CPU kernel `name`: called with the contract's arguments, then its outputs."""
    return _native("cpu", name, dtypes, refuse, plan)


def cuda(name, *, dtypes=FLOATS, refuse=None, plan=None):
    """The native CUDA kernel `name`: called with the contract's arguments, then its outputs."""
    return _native("cuda", name, dtypes, refuse, plan)


def triton(run, *, dtypes=FLOATS, refuse=None, plan=None):
    """Triton kernels launched by run(args, outs), on a GPU; on a CPU too, in Triton's interpreter, if TRITON_INTERPRET=1 at import."""

    def launch(args, outs):
        with jit.on_device(args[0]):
            run(args, outs)

    return Backend("triton", ("cuda", "cpu") if jit.INTERPRET else ("cuda",), launch, dtypes, refuse, jit.WHY_NOT, plan)


def reference(function):
    """The meaning itself, in plain PyTorch: every device and dtype."""

    def run(args, outs):
        results = function(*args)
        for out, result in zip(outs, results if isinstance(results, tuple) else (results,), strict=True):
            out.copy_(result)

    return Backend("reference", ("cpu", "cuda"), run)


class _Forced(threading.local):
    name = None


FORCED = _Forced()


@contextmanager
def use_backend(name):
    """Within the block, ops of this thread (and their backward) run on backend `name`: "cpu", "cuda", "triton" or "reference".

    None gives the choice back to the ops. An op whose backend `name` refuses raises RuntimeError with every backend's reason.
    Raises ValueError for an unknown name.
    """
    if name not in (None, "cpu", "cuda", "triton", "reference"):
        raise ValueError(f"use_backend: name wants one of 'cpu', 'cuda', 'triton', 'reference', None, got {name!r}")
    before, FORCED.name = FORCED.name, name
    try:
        yield
    finally:
        FORCED.name = before


def choose(op, backends, args):
    """The first backend that takes these arguments (the forced one, if one is)."""
    forced = FORCED.name
    for backend in backends:
        if (forced is None or backend.name == forced) and backend.why_not(args) is None:
            return backend
    raise RuntimeError(f"{op}: no backend takes this call\n" + "\n".join(f"  {n}: {w}" for n, w in refusals(backends, args)))


def refusals(backends, args):
    """(backend, reason) of every backend that would not run this call."""
    forced = FORCED.name
    reasons = {b.name: b.why_not(args) for b in backends}
    if forced is not None:
        reasons = {name: why or (None if name == forced else f"use_backend({forced!r}) is in force") for name, why in reasons.items()}
        reasons.setdefault(forced, "this op has no such backend")
    return [(name, why) for name, why in reasons.items() if why]
