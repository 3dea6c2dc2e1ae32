"""fastdiff: fast, exact, validated kernels for diffusion architectures."""

from . import diffusion, models, nn, ops
from .accelerate import accelerate, restore, sdpa
from .core.backend import use_backend
from .explain import explain
from .version import __version__

__all__ = ["__version__", "accelerate", "diffusion", "explain", "models", "nn", "ops", "restore", "sdpa", "use_backend"]
