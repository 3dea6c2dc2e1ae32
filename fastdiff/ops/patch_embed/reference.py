"""Patches times a weight, and tokens times a weight as patches of an image; a patch's elements are (channel, axes of space)."""

from math import prod


def _split(space, patch):
    return [n for size, p in zip(space, patch, strict=True) for n in (size // p, p)]


def _patches(x, patch):
    B, C, *space = x.shape
    axes = range(len(space))
    patches = x.reshape(B, C, *_split(space, patch)).permute(0, *(2 + 2 * i for i in axes), 1, *(3 + 2 * i for i in axes))
    return patches.reshape(B, prod(size // p for size, p in zip(space, patch, strict=True)), C * prod(patch))


def patch_embed(x, weight, bias, position, patch):
    y = _patches(x, patch) @ weight.T
    y = y if bias is None else y + bias
    return y if position is None else y + position


def unpatch_project(tokens, weight, bias, patch, grid):
    y = tokens @ weight.T
    y = y if bias is None else y + bias
    B, n, C = y.shape[0], len(grid), y.shape[2] // prod(patch)
    image = y.reshape(B, *grid, C, *patch).permute(0, 1 + n, *(a for i in range(n) for a in (1 + i, 2 + n + i)))
    return image.reshape(B, C, *(g * p for g, p in zip(grid, patch, strict=True)))


def patch_product(tokens, image, patch, by_tokens):
    """Of the tokens t (M, D) and patches p (M, K) of all samples: t^T p, or p^T t, and the sums of t and of p over M."""
    tokens, patches = tokens.flatten(0, 1), _patches(image, patch).flatten(0, 1)
    return tokens.T @ patches if by_tokens else patches.T @ tokens, tokens.sum(0), patches.sum(0)
