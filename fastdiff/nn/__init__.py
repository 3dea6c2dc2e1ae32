"""Drop-in modules on the ops."""

from .fourier_cross_attention import FourierCrossAttention
from .patches import PatchEmbed, Unpatch

__all__ = ["FourierCrossAttention", "PatchEmbed", "Unpatch"]
