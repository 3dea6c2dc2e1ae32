"""Drop-in modules on the ops."""

from .fourier_cross_attention import FourierCrossAttention

__all__ = ["FourierCrossAttention"]
