"""Models of the papers, one file each."""

from .perceiver import Perceiver, PerceiverIO
from .perceiver_ar import PerceiverAR
from .rin import RIN

__all__ = ["RIN", "Perceiver", "PerceiverAR", "PerceiverIO"]
