"""Drop-in modules on the ops."""

from .cross_attention import CrossAttention
from .embeddings import LabelEmbedding, TimestepEmbedding, sinusoid
from .fourier_cross_attention import FourierCrossAttention
from .group_norm import AdaGroupNorm, GroupNorm
from .layer_norm import AdaLayerNorm
from .linear import Linear
from .mlp import GEGLU, MLP
from .patches import PatchedUNet, PatchEmbed, Unpatch
from .self_attention import SelfAttention

__all__ = ["GEGLU", "MLP", "AdaGroupNorm", "AdaLayerNorm", "CrossAttention", "FourierCrossAttention", "GroupNorm", "LabelEmbedding",
           "Linear", "PatchEmbed", "PatchedUNet", "SelfAttention", "TimestepEmbedding", "Unpatch", "sinusoid"]
