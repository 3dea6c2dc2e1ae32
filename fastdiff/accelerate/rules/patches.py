"""What the rules for patch embeddings by a convolution share."""

import torch

from ...ops import patch_embed
from .rule import watched


def _no_patches(proj):
    """A reason against `patch_embed` in place of a projection, or None."""
    if type(proj) is not torch.nn.Conv2d:
        return f"its projection is a {type(proj).__name__}, not a Conv2d"
    if (proj.stride, proj.padding, proj.dilation, proj.groups) != (proj.kernel_size, (0, 0), (1, 1), 1):
        return f"its projection {proj} is not one of patches side by side"
    return None


def embeddable(x, proj):
    return (x.dim() == 4 and x.device.type in ("cpu", "cuda") and x.shape[1] == proj.in_channels and not _no_patches(proj)
            and not any(n % p for n, p in zip(x.shape[2:], proj.kernel_size, strict=True)) and not watched(proj))


def embedded(x, proj, position=None):
    return patch_embed(x, proj.weight.flatten(1), proj.bias, position, patch=proj.kernel_size, order="cpq")


def flat(m):
    return _no_patches(m.proj) if m.flatten else "it keeps the grid of patches"
