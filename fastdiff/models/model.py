"""What all models have."""

from typing import ClassVar

from torch import nn

from ..core.check import fail


def cut_normal(x, std):
    """Fills x with normal numbers, cut at two of their standard deviations."""
    nn.init.trunc_normal_(x, std=std, a=-2 * std, b=2 * std)


def initialize_linear(m):
    """Weight normal, cut at two standard deviations, of variance 1 / fan-in (as Haiku); bias 0."""
    # 0.87962566 is the standard deviation of a standard normal cut at 2.
    cut_normal(m.weight, m.in_features**-0.5 / 0.87962566)
    if m.bias is not None:
        nn.init.zeros_(m.bias)


class Model(nn.Module):
    """A module with published configurations: CONFIGS, name -> options."""

    CONFIGS: ClassVar = {}

    @classmethod
    def from_config(cls, name, **changes):
        """The model of a name in CONFIGS, its options changed where `changes` names them; random weights."""
        if name not in cls.CONFIGS:
            fail(cls.__name__, f"from_config: name wants one of {', '.join(cls.CONFIGS)}, got {name!r}")
        return cls(**cls.CONFIGS[name] | changes)
