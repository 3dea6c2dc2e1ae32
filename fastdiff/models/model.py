"""What all models have."""

from typing import ClassVar

from torch import nn

from ..core.check import fail


class Model(nn.Module):
    """A module with published configurations: CONFIGS, name -> options."""

    CONFIGS: ClassVar = {}

    @classmethod
    def from_config(cls, name, **changes):
        """The model of a name in CONFIGS, its options changed where `changes` names them; random weights."""
        if name not in cls.CONFIGS:
            fail(cls.__name__, f"from_config: name wants one of {', '.join(cls.CONFIGS)}, got {name!r}")
        return cls(**cls.CONFIGS[name] | changes)
