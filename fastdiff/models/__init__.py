"""Models of the papers, one file each."""

from .adm import ADM, Classifier
from .dit import DiT
from .patched_unet import PatchedUNet
from .perceiver import Perceiver, PerceiverIO
from .perceiver_ar import PerceiverAR
from .rin import RIN

__all__ = ["ADM", "RIN", "Classifier", "DiT", "PatchedUNet", "Perceiver", "PerceiverAR", "PerceiverIO"]
