"""What `accelerate` knows: one row per class of another package, recognised by name, so that the package is imported by its user alone.

One file per package, with its `RULES`.
"""

import importlib
from functools import lru_cache

from . import diffusers, einops, perceiver_pytorch, pytorch, rin_pytorch, timm, transformers
from .rule import Replaced, Rule, hidden

__all__ = ["RULES", "Replaced", "Rule", "hidden", "replacement", "rule_of"]


RULES = tuple(sorted((rule for package in (diffusers, einops, perceiver_pytorch, pytorch, rin_pytorch, timm, transformers)
                      for rule in package.RULES), key=lambda rule: rule.kind))
_BY_CLASS = {(rule.module, rule.name): rule for rule in RULES}


def rule_of(cls):
    """The rule whose row names `cls`, or None."""
    return _BY_CLASS.get((cls.__module__, cls.__qualname__))


def _alias(rule):
    return rule.kind.replace(".", "_")


@lru_cache(None)
def replacement(cls):
    """The class that modules of `cls` get: `cls` with the rule's forward. It is found again by name here, so that pickling works."""
    rule = rule_of(cls)
    return type(_alias(rule), (cls, Replaced), {"forward": rule.forward(cls.forward), "__module__": __name__, "__doc__": cls.__doc__})


def __getattr__(name):
    for rule in RULES:
        if rule.forward and _alias(rule) == name:
            return replacement(getattr(importlib.import_module(rule.module), rule.name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
