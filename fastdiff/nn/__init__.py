"""Drop-in modules on the ops."""

from .cross_attention import CrossAttention
from .fourier_cross_attention import FourierCrossAttention
from .linear import Linear
from .mlp import MLP
from .patches import PatchedUNet, PatchEmbed, Unpatch
from .self_attention import SelfAttention

__all__ = ["MLP", "CrossAttention", "FourierCrossAttention", "Linear", "PatchEmbed", "PatchedUNet", "SelfAttention", "Unpatch"]
