"""Faster layers in models as they are: `accelerate` swaps known modules, `restore` undoes it, `sdpa` redirects PyTorch's own."""

from .redirect import sdpa
from .walk import accelerate, restore

__all__ = ["accelerate", "restore", "sdpa"]
