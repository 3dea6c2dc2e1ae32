"""What `accelerate` knows: one row per class of another package, recognised by name, so that the package is imported by its user alone.

One file per package, with its `RULES`; `traced` looks into the classes no row names.
"""

import importlib
from functools import lru_cache

from . import (
    denoising_diffusion,
    diffusers,
    einops,
    hourglass_transformer_pytorch,
    perceiver_ar_pytorch,
    perceiver_pytorch,
    pytorch,
    rin_pytorch,
    timm,
    traced,
    transformers,
)
from .rule import Replaced, Rule, hidden

__all__ = ["RULES", "Replaced", "Rule", "hidden", "own_class", "plain_class", "replacement", "rule_of", "traced"]

_PACKAGES = (denoising_diffusion, diffusers, einops, hourglass_transformer_pytorch, perceiver_ar_pytorch, perceiver_pytorch, pytorch,
             rin_pytorch, timm, transformers)
RULES = tuple(sorted((rule for package in _PACKAGES for rule in package.RULES), key=lambda rule: rule.kind))
_BY_CLASS = {(rule.module, rule.name): rule for rule in RULES}


def rule_of(cls):
    """The rule whose row names `cls`, or None."""
    return _BY_CLASS.get((cls.__module__, cls.__qualname__))


def _alias(rule):
    return rule.kind.replace(".", "_")


@lru_cache(None)
def replacement(rule, cls):
    """The class that modules of `cls` get: `cls` with the rule's forward. It is found again by name here, so that pickling works."""
    return type(_alias(rule), (cls, Replaced), {"forward": rule.forward(cls.forward), "__module__": __name__, "__doc__": cls.__doc__})


def own_class(cls):
    """cls, or what `fully_shard` made it of."""
    return cls.__bases__[1] if cls.__bases__[0].__name__ == "FSDPModule" and len(cls.__bases__) == 2 else cls


@lru_cache(None)
def plain_class(cls):
    """The class a module of `cls` had before it was replaced."""
    if Replaced in cls.__bases__:
        return cls.__bases__[0]
    if not issubclass(cls, Replaced):
        return cls
    bases = tuple(map(plain_class, cls.__bases__))  # sharded since
    return type(cls.__name__.replace(own_class(cls).__name__, bases[-1].__name__), bases, dict(vars(cls)))


def __getattr__(name):
    for rule in RULES:
        if rule.forward and _alias(rule) == name:
            return replacement(rule, getattr(importlib.import_module(rule.module), rule.name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
