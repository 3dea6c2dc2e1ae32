"""Contracts: an op's schema, meaning, shapes, backends and derivatives, registered with torch. The only file that calls torch.library."""

import importlib
from contextlib import nullcontext

import torch
import torch.autograd.forward_ad as forward_ad
from torch import _C
from torch._C._functorch import is_legacy_batchedtensor
from torch._functorch.autograd_function import enable_single_level_autograd_function

from . import backend as _backend
from . import native
from .backend import FORCED, choose, use_backend

NAMESPACE = "fastdiff"
REGISTRY = {}
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
_ENTRIES = torch.library.Library(native.LIBRARIES["cpu"], "IMPL")
_PLAIN = (torch.Tensor, torch.nn.Parameter)
# Bound once: looking these up through torch costs a tiny call a tenth of its time.
is_compiling, _grad_enabled, _function_modes = torch.compiler.is_compiling, torch.is_grad_enabled, _C._len_torch_function_stack
# Where an eager entry has no say: kernels under these keys return None before the native one is reached. The last stands for every
# device and layout but a dense tensor on the CPU.
_SILENT = ("Python", "FuncTorchDynamicLayerFrontMode", "FuncTorchBatched", "Batched", "AutocastCPU", "CompositeExplicitAutograd")


def _entry(name):
    """The native eager entry `name`, or None without the library."""
    entry = native.op("cpu", name)
    if entry is not None:
        count = len(entry._schema.returns)
        nothing = None if count == 1 else (None,) * count
        for key in _SILENT:
            _ENTRIES.impl(name, lambda *args: nothing, key)
    return entry


class Contract:
    """One op. Calling it runs it: eagerly without torch's dispatcher where nothing needs that, else as torch.ops.fastdiff.<name>.

    Without derivative rules (`autograd`) the reference stands in for the op wherever a derivative of it is wanted, so every order and
    mode works; with them, forward and backward are kernels and `backward` is written in ops that are differentiable themselves.
    """

    def __init__(self, schema, outputs, values, reference, backends, module, autocast, entries):
        self.name = schema.split("(")[0]
        self.outputs, self.values, self.reference, self.module, self.autocast = outputs, values, reference, module, autocast
        named = any(b.name == "reference" for b in backends)
        self.backends = backends if named else (*backends, _backend.reference(reference))
        self._backward, self._tangents, self._applies, self._entries = None, False, None, tuple(filter(None, map(_entry, entries)))
        _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        self.op = getattr(getattr(torch.ops, NAMESPACE), self.name).default
        kinds = [(i, a.name, str(a.type)) for i, a in enumerate(self.op._schema.arguments)]
        self._tensors = tuple((i, name, "Optional" in kind) for i, name, kind in kinds if "Tensor" in kind)
        self._required = tuple(i for i, _, optional in self._tensors if not optional)
        _LIBRARY.impl(self.name, self.run, "CompositeExplicitAutograd")
        _LIBRARY.impl(self.name, self._autograd, "Autograd", with_keyset=True)
        torch.library.register_fake(f"{NAMESPACE}::{self.name}", outputs, lib=_LIBRARY)

    def __call__(self, *args):
        if self.autocast and _C._is_any_autocast_enabled():
            args = self._cast(args)
        wanted = self._plain(args)
        if wanted is False:
            return self.run(*args)
        if wanted and self._backward is not None and (self._applies is None or self._applies(*args)):
            return self._apply(None, *args)
        for i, name, optional in self._tensors:
            if not (isinstance(args[i], torch.Tensor) or (optional and args[i] is None)):
                raise TypeError(f"{self.name}: {name} wants a torch.Tensor, got {type(args[i]).__name__}")
        return self.op(*args)

    def run(self, *args):
        """Checks, allocates and computes on real tensors, with no derivative."""
        outs = self.outputs(*args)
        if self.values is not None:
            self.values(*args)
        made = outs if isinstance(outs, tuple) else (outs,)
        for y in made:
            if y.nbytes >= native.LARGE:
                native.prepare(y)
        choose(self.name, self.backends, args).run(args, made)
        return outs

    def eager(self, args, entry=0, optional=(), required=None):
        """The result of a native eager entry, where that is all the call needs; otherwise None.

        args: the contract's required tensors, then what else the entry takes; optional: tensors or None among the latter; required: places
        in args of tensors, where they are not the contract's. It spares a tiny call this class's checks, allocation and choice: the entry
        recognises plain arguments itself and is silent about others, and where a mode, a transform or autocast is on.
        """
        if not self._entries or is_compiling() or FORCED.name not in (None, "cpu") or forward_ad._current_level >= 0 or _function_modes():
            return None
        grad = _grad_enabled()
        for i in self._required if required is None else required:
            x = args[i]
            if type(x) not in _PLAIN or (grad and x.requires_grad):
                return None
        for x in optional:
            if x is not None and (type(x) not in _PLAIN or (grad and x.requires_grad)):
                return None
        return self._entries[entry](*args)

    def _plain(self, args):
        """Whether a derivative is wanted; None where tracing, a transform, a mode, a subclass or a tangent needs torch's dispatcher."""
        if (is_compiling() or _C._are_functorch_transforms_active() or _C._len_torch_dispatch_stack() or _function_modes()
                or forward_ad._current_level >= 0):
            return None
        grad, wanted = _grad_enabled(), False
        for i, _, optional in self._tensors:
            x = args[i]
            if type(x) in _PLAIN:
                if x.is_meta or is_legacy_batchedtensor(x):
                    return None
                wanted = wanted or (grad and x.requires_grad)
            elif not (optional and x is None):
                return None
        return wanted

    def _cast(self, args):
        """As autocast treats matrix products: floating tensors but float64 go to the autocast dtype."""
        device = next((x.device.type for x in args if isinstance(x, torch.Tensor)), "cpu")
        if not torch.is_autocast_enabled(device):
            return args
        dtype = torch.get_autocast_dtype(device)
        wants = lambda x: isinstance(x, torch.Tensor) and x.is_floating_point() and x.dtype != torch.float64 and x.dtype != dtype
        return tuple(x.to(dtype) if wants(x) else x for x in args)

    # Derivatives

    def autograd(self, *, save, backward, jvp=None, applies=None):
        """save(ctx, args, outs) -> tensors kept; backward(ctx, *dout) and jvp(ctx, *tangents) -> one entry per argument, per output.

        ctx.saved_tensors are the kept tensors, ctx.args the other arguments in place (None for tensors), ctx.wants the arguments whose
        gradient is wanted; a gradient or tangent that is absent is None. Both are written in differentiable ops. Without jvp the reference
        stands in wherever a tangent is wanted, and where applies(*args) is given and false wherever any derivative is.
        """
        contract = self

        def forward(ctx, keyset, *args):
            if keyset is None:
                outs = contract.run(*args)
            else:
                with _C._AutoDispatchBelowAutograd():
                    outs = contract.op.redispatch(keyset & _C._after_autograd_keyset, *args)
            kept = save(ctx, args, outs)
            ctx.save_for_backward(*kept)
            ctx.save_for_forward(*kept)
            ctx.args = tuple(None if isinstance(a, torch.Tensor) else a for a in args)
            ctx.backend = FORCED.name
            ctx.set_materialize_grads(False)
            ctx.wants = ctx.needs_input_grad[1:]
            return outs

        def _reverse(ctx, *douts):
            with use_backend(ctx.backend) if ctx.backend else nullcontext():
                return None, *backward(ctx, *douts)

        self._backward, self._tangents, self._applies = backward, jvp is not None, applies
        self._function = type(f"{self.name}_autograd", (torch.autograd.Function,), {
            "forward": staticmethod(forward), "backward": staticmethod(_reverse),
            "jvp": staticmethod(lambda ctx, _, *tangents: jvp(ctx, *tangents))})
        self._apply = super(torch.autograd.Function, self._function).apply

    def vmap(self, rule):
        """rule(info, in_dims, *args) -> (outs, out_dims), as for torch.library.register_vmap."""
        torch.library.register_vmap(f"{NAMESPACE}::{self.name}", rule, lib=_LIBRARY)

    def vmap_batch(self, shared=(), apart=lambda *args: False):
        """The rule of an op whose tensors have B in front: the mapped axis joins it. One call after the other where a tensor of `shared`
        (places in the schema), which has no B, is mapped, or where apart(*args)."""

        def rule(info, in_dims, *args):
            n, axes = info.batch_size, [d if isinstance(a, torch.Tensor) else None for a, d in zip(args, in_dims, strict=True)]
            if any(axes[i] is not None for i in shared) or apart(*args):
                each = [self(*(a if d is None else a.select(d, i) for a, d in zip(args, axes, strict=True))) for i in range(n)]
                outs = tuple(map(torch.stack, zip(*each, strict=True))) if isinstance(each[0], tuple) else torch.stack(each)
            else:
                join = lambda x, d: (x.unsqueeze(0).expand(n, *x.shape) if d is None else x.movedim(d, 0)).flatten(0, 1)
                split = lambda y: y.unflatten(0, (n, y.shape[0] // n))
                outs = self(*(join(a, d) if isinstance(a, torch.Tensor) and i not in shared else a
                              for i, (a, d) in enumerate(zip(args, axes, strict=True))))
                outs = tuple(map(split, outs)) if isinstance(outs, tuple) else split(outs)
            return outs, (0,) * len(outs) if isinstance(outs, tuple) else 0

        self.vmap(rule)

    def _autograd(self, keyset, *args):
        if (_C.is_grad_enabled() and _C._any_requires_grad(*args)) or forward_ad._current_level >= 0:
            if (self._backward is None or (forward_ad._current_level >= 0 and not self._tangents)
                    or (self._applies is not None and not self._applies(*args))):
                return self._composite(args)
            if _C._are_functorch_transforms_active():
                with enable_single_level_autograd_function():
                    return self._apply(keyset, *args)
            return self._apply(keyset, *args)
        with _C._AutoDispatchBelowAutograd():
            return self.op.redispatch(keyset & _C._after_autograd_keyset, *args)

    def _composite(self, args):
        self.outputs(*args)
        return self.reference(*args)

    # For explain, testing and bench

    def cases(self):
        """public function name -> Case, from the op folder's cases.py."""
        return importlib.import_module(f"{self.module}.cases").CASES

    def public(self):
        """public function name -> function, for every case of this contract's folder."""
        folder = importlib.import_module(self.module)
        return {name: getattr(folder, name) for name in self.cases()}

    @property
    def composite(self):
        """Whether a call that wants a derivative runs the reference itself, for want of derivative rules."""
        return self._backward is None


def constant(*tensors):
    """Whether no derivative with respect to any of the tensors, or None, is asked for."""
    forward = forward_ad._current_level >= 0
    return not any(x is not None and (x.requires_grad or (forward and forward_ad.unpack_dual(x).tangent is not None)) for x in tensors)


def into(name, outs, *args):
    """Computes op `name` into given tensors, shaped as it would make them: for ops composed of others. No checks, no derivative."""
    choose(name, REGISTRY[name].backends, args).run(args, outs)


def without_autocast(x):
    """Context in which autocast leaves the operations on x's device alone."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind) else nullcontext()


def public():
    """public function name -> (function, Case), over all op folders."""
    return {name: (function, made.cases()[name]) for made in REGISTRY.values() for name, function in made.public().items()}


def contract(schema, *, outputs, reference, backends=(), module, values=None, autocast=False, entries=()):
    """Defines torch.ops.fastdiff.<name> and returns its Contract, kept in REGISTRY.

    outputs(*args): refuses bad input and allocates the results (real or fake). values(*args): refuses bad values, on real tensors alone.
    reference(*args): the meaning. backends: rows in order of preference (None is skipped); the reference is appended as the last, unless
    it is among them.
    module: the op folder's package name. autocast: cast as autocast casts matrix products. entries: names of native eager
    entries, if there are any (Contract.eager).
    """
    made = Contract(schema, outputs, values, reference, tuple(b for b in backends if b), module, autocast, entries)
    REGISTRY[made.name] = made
    return made
