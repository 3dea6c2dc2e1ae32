"""einops: a Sequential's Rearrange between image and rows of patches, with the linear layer beside it."""

from math import prod

import torch

from ...ops import patch_embed, patchify, unpatch_project, unpatchify
from .rule import Rule, watched


def _axes(side):
    """Half a pattern of einops, "b (h p)", as (("b",), ("h", "p"))."""
    axes, inside = [], False
    for word in side.replace("(", " ( ").replace(")", " ) ").split():
        if word in "()":
            inside = word == "("
            axes += [()] if inside else []
        elif inside:
            axes[-1] += (word,)
        else:
            axes.append((word,))
    return axes


def _pattern(pattern, given):
    """(whether to tokens, order, names of the patch's axes, of the grid's) of a pattern between image and rows of patches, else None."""
    left, right = map(_axes, pattern.split("->"))
    for image, rows in ((left, right), (right, left)):
        if len(rows) == 3 and 3 <= len(image) <= 5 and [len(axis) for axis in image] == [1, 1] + [2] * (len(image) - 2):
            names = [name for axis in image for name in axis]
            batch, channel, grid, patch = image[0], image[1], *zip(*image[2:], strict=True)
            orders = {(*patch, *channel): "pqc", (*channel, *patch): "cpq"}
            if (rows[:2] == [batch, grid] and rows[2] in orders and all(map(str.isidentifier, names)) and len({*names}) == len(names)
                    and set(patch) <= set(given) <= {*patch, *grid}):
                return image is left, orders[rows[2]], patch, grid
    return None


_PATTERNS = {}
def _patches(m):
    """(whether to tokens, order, patch, names of the grid's axes) of an einops Rearrange between image and rows of patches, else None."""
    if type(m).__qualname__ != "Rearrange" or type(m).__module__ != "einops.layers.torch":
        return None
    key = m.pattern, tuple(m.axes_lengths)
    if key not in _PATTERNS:
        _PATTERNS[key] = _pattern(*key)
    found = _PATTERNS[key]
    return found and (*found[:2], tuple(m.axes_lengths[name] for name in found[2]), found[3])


def _grid(m, names, N):
    """The grid of N patches whose axes' lengths m knows but for one, or None."""
    known = [m.axes_lengths.get(name) for name in names]
    if known.count(None) == 1:
        rest = prod([n for n in known if n is not None])
        known = [N // max(rest, 1) if n is None else n for n in known]
    return None if None in known or prod(known) != N else tuple(known)


def _to_tokens(x, m, linear, order, patch, names):
    """Rearrange m, and the linear layer behind it if there is one; None where x is not for it."""
    grid = [n // p for n, p in zip(x.shape[2:], patch, strict=False)]
    if x.dim() != 2 + len(patch) or any(n % p for n, p in zip(x.shape[2:], patch, strict=True)):
        return None
    if any(m.axes_lengths.get(name, n) != n for name, n in zip(names, grid, strict=True)):
        return None
    if linear is None:
        return patchify(x, patch, order=order)
    if x.shape[1] * prod(patch) != linear.in_features:
        return None
    return patch_embed(x, linear.weight, linear.bias, patch=patch, order=order)


def _to_image(x, m, linear, order, patch, names):
    """Rearrange m, and the linear layer before it if there is one; None where x is not for it."""
    grid = None if x.dim() != 3 else _grid(m, names, x.shape[1])
    width = x.shape[-1] if linear is None else linear.out_features
    if grid is None or width % prod(patch) or (linear is not None and x.shape[-1] != linear.in_features):
        return None
    if linear is None:
        return unpatchify(x, patch, grid, order=order)
    return unpatch_project(x, linear.weight, linear.bias, patch=patch, grid=grid, order=order)


def _plain_linear(m):
    return m if type(m) is torch.nn.Linear and not watched(m) else None


def _sequential(plain):
    def forward(self, input):
        x, steps = input, [*self]
        while steps:
            m, then = steps.pop(0), steps[0] if steps else None
            y, found = None, None if watched(m) else _patches(m)
            if isinstance(x, torch.Tensor) and x.device.type in ("cpu", "cuda") and x.is_floating_point():
                if found and found[0]:
                    y = _to_tokens(x, m, _plain_linear(then), *found[1:])
                    steps = steps[1:] if y is not None and _plain_linear(then) else steps
                elif found:
                    y = _to_image(x, m, None, *found[1:])
                elif _plain_linear(m) and then is not None and not watched(then) and (found := _patches(then)) and not found[0]:
                    y = _to_image(x, then, m, *found[1:])
                    steps = steps[1:] if y is not None else steps
            x = m(x) if y is None else y
        return x

    return forward


RULES = (
    Rule("torch.nn.modules.container", "Sequential", _sequential, about=lambda m: any(map(_patches, m)), inputs=frozenset(("input",)),
         options=frozenset(("args",))),
)
