"""What a call would do, without doing it: backend, plan, least work, and why the other backends refuse."""

import inspect
from dataclasses import dataclass

import torch
from torch.overrides import TorchFunctionMode

from .core.backend import refusals
from .core.contract import NAMESPACE, REGISTRY, public


class _Recorder(TorchFunctionMode):
    """Stands between public functions and their ops: checks and allocates as the op would, and computes nothing."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "namespace", None) != NAMESPACE:
            return function(*args, **(kwargs or {}))
        contract = REGISTRY[function._schema.name.removeprefix(f"{NAMESPACE}::")]
        outs = contract.outputs(*args)
        if contract.values is not None:
            contract.values(*args)
        self.calls.append((contract, args))
        return outs


def calls(function, *args, **kwargs):
    """(contract, its arguments) of every op that function(*args, **kwargs) would run. Raises what the call itself would."""
    with _Recorder() as recorder:
        function(*args, **kwargs)
    return recorder.calls


def backend(contract, args):
    """(backend or None, [(backend name, reason it would not run)]) of a call of this contract."""
    refused = refusals(contract.backends, args)
    wants = torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in args)
    if wants and contract.composite:
        known, why = dict(refused), "a derivative is wanted, and this op has no derivative kernel"
        return contract.backends[-1], [(b.name, known.get(b.name, why)) for b in contract.backends[:-1]]
    return next((b for b in contract.backends if b.name not in dict(refused)), None), refused


@dataclass(frozen=True)
class Explanation:
    """backend: the one that would run (None: all refuse). plan: how, in its own words. flops, bytes: the least work of the forward call.

    refusals: (backend, reason) of those that would not run. floor: least time in ms by the ceilings measured in this process, or None.
    """

    op: str
    inputs: str
    backend: str | None
    plan: str
    flops: float
    bytes: float
    refusals: list
    device: str
    dtype: str

    def floor_ms(self, ceilings):
        """Least time in ms by these `fastdiff.bench.roofline.Ceilings`."""
        return ceilings.floor_ms(self.flops, self.bytes, self.dtype)

    @property
    def floor(self):
        from .bench.roofline import MEASURED

        known = MEASURED.get((self.device, torch.get_num_threads()))
        return self.floor_ms(known) if known and self.dtype in known.gemm_GFs else None

    def __str__(self):
        floor = "not known: ceilings are measured by `python -m fastdiff bench`" if self.floor is None else f"{self.floor:.4g} ms"
        rows = [("backend", self.backend or "none: every backend refuses"), ("plan", self.plan),
                ("work", f"{_si(self.flops)}flop, {_si(self.bytes)}B read and written at least"), ("floor", floor),
                *(("refused", f"{name}: {why}") for name, why in self.refusals)]
        return "\n".join([f"{self.op}({self.inputs}) on {self.device}", *(f"  {key:8} {text}" for key, text in rows if text)])

    __repr__ = __str__


def _si(value):
    for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.3g} "


def _text(value):
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    return repr(value)


def explain(op, *args, **kwargs):
    """Explanation of a call of `op` (a public op or its name) with these arguments; nothing is computed.

    Raises   ValueError for an unknown op, and whatever the call itself would raise
    """
    known = public()
    name = getattr(op, "__name__", op)
    if not isinstance(name, str) or name not in known or (callable(op) and op is not known[name][0]):
        raise ValueError(f"explain: op wants one of {', '.join(sorted(known))}, or that function, got {op!r}")
    function, case = known[name]
    made = calls(function, *args, **kwargs)
    given = inspect.signature(function).bind(*args, **kwargs)
    shown = ", ".join(f"{key}={_text(value)}" for key, value in given.arguments.items())
    given.apply_defaults()
    first = made[0][1][0]
    chosen = [(contract, inputs, *backend(contract, inputs)) for contract, inputs in made]
    plans = [b.plan(*inputs) for _, inputs, b, _ in chosen if b and b.plan]
    return Explanation(
        op=name, inputs=shown, backend=chosen[0][2] and chosen[0][2].name, plan="; ".join(plans), flops=case.flops(**given.arguments),
        bytes=case.bytes(first.element_size(), **given.arguments), refusals=[row for *_, refused in chosen for row in refused],
        device=first.device.type, dtype=str(first.dtype).removeprefix("torch."))
