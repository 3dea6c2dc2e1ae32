"""The walk over a model that swaps modules by the rules, and back."""

from collections import Counter

import torch

from .measure import measure
from .report import Kept, Report, Swapped
from .rules import Replaced, own_class, plain_class, replacement, rule_of, traced


def _choice(m):
    """(reason to leave module m, its new class, note): a reason or a class, or neither when there is nothing to say on it."""
    if isinstance(m, Replaced):
        return "already replaced", None, None
    cls = own_class(type(m))
    rule = next((r for r in map(rule_of, cls.__mro__) if r), None)
    if rule is None or not rule.about(m):
        return *traced.look(m), None
    if rule is not rule_of(cls):
        return f"a subclass of {rule.kind}: it may compute something else", None, None
    why = rule.why_not(m)
    return (why, None, None) if why else (None, replacement(rule, type(m)), rule.note(m))


def accelerate(model, example=None, *, show=True):
    """Replaces in place what the rules know among the modules of `model`, leaves the rest, and reports both.

    Modules stay the same objects with the same parameters, buffers, hooks and mode; only their class changes, to a subclass whose forward
    runs `fastdiff.ops`. `restore` undoes it; copies and pickles stay accelerated.

    example  a tensor, a tuple of positional or a dict of keyword inputs: the model runs on it before and after, in eval mode, and the
             report has errors, times and memory; modules that are not faster on it are left alone, those in training mode when they are
             faster neither forward nor with backward, or slower in one. When it raises, so is the model
    show     whether to print the report
    Returns  Report: replaced, kept (with reasons) and, with an example, per module and in all error_forward, error_backward,
             time_before, time_after, memory_before, memory_after, step_before, step_after (in training mode), and share_dense
    Raises   TypeError when model is not a torch.nn.Module or example is of another kind
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"accelerate: model wants a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(example, None | torch.Tensor | tuple | dict):
        raise TypeError(f"accelerate: example wants a tensor, a tuple or a dict of inputs, got {type(example).__name__}")
    report, swaps, rest = Report(), [], Counter()
    for name, m in model.named_modules():
        why, fast, note = _choice(m)
        name, kind = name or "(the model)", f"{type(m).__module__}.{type(m).__qualname__}"
        if why:
            report.kept.append(Kept(name, kind, why))
        elif fast:
            report.replaced.append(Swapped(name, kind, note))
            swaps.append((m, type(m), fast))
        elif next(m.children(), None) is None and not isinstance(m, torch.nn.ModuleList | torch.nn.ModuleDict):
            rest[kind] += 1
    report.kept += [Kept(f"{count} module{'s' * (count > 1)}", kind, "no rule") for kind, count in rest.most_common()]
    for m, _, fast in swaps:
        m.__class__ = fast
    if example is not None:
        try:
            measure(report, model, swaps, example)
        except BaseException:
            for m, plain, _ in swaps:
                m.__class__ = plain
            raise
    if show:
        report.print()
    return report


def restore(model):
    """Gives every module that `accelerate` replaced its own class again; returns the model."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"restore: model wants a torch.nn.Module, got {type(model).__name__}")
    for m in model.modules():
        if isinstance(m, Replaced):
            m.__class__ = plain_class(type(m))
    return model
