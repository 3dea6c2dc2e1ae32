"""Drop-in modules on the ops."""

from .cross_attention import CrossAttention
from .fourier_cross_attention import FourierCrossAttention
from .patches import PatchedUNet, PatchEmbed, Unpatch
from .self_attention import SelfAttention

__all__ = ["CrossAttention", "FourierCrossAttention", "PatchEmbed", "PatchedUNet", "SelfAttention", "Unpatch"]
