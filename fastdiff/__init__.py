"""fastdiff: fast, exact, validated kernels for diffusion architectures."""

from . import ops
from .core.backend import use_backend
from .version import __version__

__all__ = ["__version__", "ops", "use_backend"]
