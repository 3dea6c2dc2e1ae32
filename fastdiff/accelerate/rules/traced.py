"""Any class: GroupNorm or LayerNorm with what follows it, (1 + scale) and shift and SiLU, found by torch.fx in a module's own forward.

What is found is one call of an op in a copy of the traced code, made for a set of arguments given as tensors and the module's plain
attributes as they are; other calls run the original. The code stands in the class, so that copies and pickles take it along.
"""

import dis
import inspect
import operator
from functools import lru_cache
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import fx, nn

from ...ops import group_norm_modulate, layer_norm_modulate
from .rule import Replaced, pays, watched

_NORMS = (nn.GroupNorm, nn.LayerNorm)
_ADD, _MUL = ({getattr(operator, name), getattr(torch, name), name} for name in ("add", "mul"))
# Answers that tracing would take for given.
_ASKS = frozenset("isinstance type is_grad_enabled is_autocast_enabled requires_grad checkpoint random print len callable".split())
_STORES = frozenset(("STORE_ATTR", "DELETE_ATTR", "STORE_GLOBAL"))
_CONSTANTS = (bool, int, float, str, type(None))


def _takes(x, *others):
    return (x.device.type == "cpu" or (x.device.type == "cuda" and not torch.is_autocast_enabled("cuda"))) and all(
        t is None or t.dtype in (x.dtype, torch.float32) for t in others)


def _per_sample(t, x, channel):
    """t (B, C), where x * t is t per sample and channel; None where it is not."""
    shape = [1] * x.dim()
    shape[0], shape[channel] = x.shape[0], x.shape[channel]
    return t.reshape(shape[0], shape[channel]) if list(t.shape) == shape else None


def norm_modulate(norm, x, scale=None, shift=None, silu=False, act=None):
    """act(norm(x) (1 + scale) + shift) by one op where it takes them, else as written; act: the SiLU module, or silu for the function."""
    group = type(norm) is nn.GroupNorm
    op = "layer norm" if not group else "group norm" if scale is None else "modulated group norm"
    taken = type(norm) in _NORMS and (3 <= x.dim() <= 5 if group else x.dim() == 3) and pays(op, x)
    if taken and not watched(norm, *([act] if act is not None else [])):
        parts = [None if t is None else t if not group and t.shape == x.shape else _per_sample(t, x, 1 if group else -1)
                 for t in (scale, shift)]
        if _takes(x, norm.weight, norm.bias, *parts) and (scale is None) == (parts[0] is None) and (shift is None) == (parts[1] is None):
            if group:
                return group_norm_modulate(x, norm.num_groups, norm.weight, norm.bias, *parts, eps=norm.eps, silu=silu or act is not None)
            if len(norm.normalized_shape) == 1:
                return layer_norm_modulate(x, parts[1], parts[0], norm.weight, norm.bias, eps=norm.eps)
    y = norm(x)
    if scale is not None:
        y = y * (1 + scale)
    if shift is not None:
        y = y + shift
    return act(y) if act is not None else F.silu(y) if silu else y


class _Level(fx.Tracer):
    """Traces a module's own forward; the modules it holds are calls."""

    def is_leaf_module(self, m, name):
        return True

    def create_arg(self, a):
        if isinstance(a, torch.Tensor) and not any(a is t for t in (*self.root.parameters(), *self.root.buffers())):
            raise ValueError("its forward makes a tensor that depends on no input")  # the tracer would keep it, in the module
        return super().create_arg(a)


def _sole_user(node):
    return next(iter(node.users)) if len(node.users) == 1 else None


def _other(node, targets, known):
    """The other operand, when node is an operation of `targets` on `known` and one more; a number or a node."""
    if node is not None and node.target in targets and node.op != "call_module" and len(node.args) == 2 and not node.kwargs:
        a, b = node.args
        if (a is known) != (b is known):
            return b if a is known else a
    return None


def _one_more(node):
    """s, when node is 1 + s."""
    if isinstance(node, fx.Node) and node.op != "call_module" and node.target in _ADD and len(node.args) == 2:
        for one, s in (node.args, node.args[::-1]):
            if type(one) in (int, float) and one == 1 and isinstance(s, fx.Node) and not node.kwargs:
                return s
    return None


def _fuse(graph, m):
    """How many norms of the graph of module m became one call with what follows them."""
    found, kept = 0, {n for n in graph.nodes if n.op in ("placeholder", "output")}
    for node in list(graph.nodes):
        norm = m.get_submodule(node.target) if node.op == "call_module" else None
        if type(norm) not in _NORMS or len(node.args) != 1 or node.kwargs:
            continue
        last, scale, shift, silu, act = node, None, None, False, None
        user = _sole_user(last)
        if (s := _one_more(_other(user, _MUL, last))) is not None:
            last, scale, user = user, s, _sole_user(user)
            if isinstance(b := _other(user, _ADD, last), fx.Node):
                last, shift, user = user, b, _sole_user(user)
        if type(norm) is nn.GroupNorm and user is not None and user.args[:1] == (last,):
            if user.op == "call_function" and user.target is F.silu:
                last, silu = user, True
            elif user.op == "call_module" and type(m.get_submodule(user.target)) is nn.SiLU:
                last, act = user, user.target
        if last is node:
            continue
        with graph.inserting_before(last):
            held = [None if name is None else graph.create_node("get_attr", name) for name in (node.target, act)]
            new = graph.call_function(norm_modulate, (held[0], node.args[0], scale, shift, silu, held[1]))
        last.replace_all_uses_with(new)
        dead = [last]
        while dead:
            gone = dead.pop()
            if not gone.users and gone not in (new, *kept):
                kept.add(gone)
                dead += gone.all_input_nodes
                graph.erase_node(gone)
        found += 1
    return found


def _constants(m):
    return tuple((name, value) for name, value in vars(m).items()
                 if type(value) in _CONSTANTS and name != "training" and not name.startswith("_"))


def _traced(m, given):
    """(how many norms were fused, code) of module m's forward with the arguments `given` as tensors and the others left out."""
    plain, cls, names = type(m).forward, type(m), ", ".join(given)
    scope = {"plain": plain}
    exec(f"def forward(self, {names}): return plain(self, {', '.join(f'{n}={n}' for n in given)})", scope)
    m.__class__ = type(cls.__name__, (cls,), {"forward": scope["forward"]})
    try:
        graph = _Level().trace(m)
    finally:
        m.__class__ = cls
    found = _fuse(graph, m)
    code = graph.python_code("self")
    return found, (code.src, tuple((n, value) for n, value in sorted(code.globals.items(), key=lambda item: item[0])
                                   if n in code.src and not isinstance(value, ModuleType)))


def _objections(function):
    code = inspect.unwrap(function).__code__
    if any(i.opname in _STORES for i in dis.get_instructions(code)):
        return "its forward changes attributes"
    asks = sorted(_ASKS.intersection(code.co_names))
    return f"its forward asks {asks[0]}, whose answer a trace would fix" if asks else None


def look(m):
    """(reason why not, None), (None, the class for module m), or (None, None) when it holds no norm or nothing follows one."""
    cls = type(m)
    own = cls.__module__.startswith("torch.nn.") and cls is not nn.Sequential
    holders = (m, *(c for c in m.children() if isinstance(c, nn.ModuleList | nn.ModuleDict)))
    if own or not any(type(child) in _NORMS for holder in holders for child in holder.children()):
        return None, None
    if "forward" in vars(m):
        return "its forward was replaced on the instance", None
    try:
        parameters = [*inspect.signature(cls.forward).parameters.values()][1:]
        why = _objections(cls.forward)
    except (AttributeError, TypeError, ValueError):
        return "its forward is not Python", None
    if why:
        return f"cannot be traced: {why}", None
    usual = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    needed = tuple(p.name for p in usual if p.default is p.empty)
    whole = tuple(p.name for p in usual if p.default is p.empty or p.default is None)
    runs, found, mode = [], 0, m.training
    try:
        for given in dict.fromkeys((needed, whole)):
            for m.training in (False, True):
                try:
                    count, code = _traced(m, given)
                except Exception as error:  # a forward may raise anything on a stand-in for a tensor
                    why = f"cannot be traced: {str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}"
                else:
                    found += count
                    if count:
                        runs.append((given, m.training, *code))
    finally:
        m.training = mode
    if not found:
        return why, None
    return None, traced(cls, tuple(runs), _constants(m), tuple(m._modules))


def _made(cls, *spec):
    """An empty module of the class, for pickle."""
    kind = traced(cls, *spec)
    return kind.__new__(kind)


@lru_cache(None)
def traced(cls, runs, constants, children):
    """The class of modules of `cls` with these children and constants; runs: (arguments given, training, code, its globals)."""
    plain, functions = cls.forward, {}
    parameters = [*inspect.signature(plain).parameters.values()][1:]
    order = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    left_out = {p.name: p.default for p in parameters}
    for given, training, code, scope in runs:
        scope = dict(scope, torch=torch)
        exec(compile(code, f"<{cls.__qualname__}, traced>", "exec"), scope)
        functions[frozenset(given), training] = scope["forward"]

    def forward(self, *arguments, **keywords):
        given = {n: a for n, a in (*zip(order, arguments, strict=False), *keywords.items()) if a is not left_out.get(n, plain)}
        run = functions.get((frozenset(given), self.training)) if len(arguments) <= len(order) else None
        if (run is None or not all(isinstance(a, torch.Tensor) for a in given.values()) or tuple(self._modules) != children
                or any(getattr(self, name, plain) != value for name, value in constants)):
            return plain(self, *arguments, **keywords)
        return run(self, **given)

    def reduce(self, protocol):
        return _made, (cls, runs, constants, children), self.__getstate__() if hasattr(self, "__getstate__") else vars(self)

    return type(cls.__name__, (cls, Replaced), {"forward": forward, "__reduce_ex__": reduce, "__module__": cls.__module__,
                                                "__qualname__": cls.__qualname__, "__doc__": cls.__doc__})
