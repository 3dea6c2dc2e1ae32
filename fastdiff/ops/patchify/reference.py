"""Patchify, the same as an image, and their inverses in reshapes and permutations."""


def _axes(space, order):
    """Permutation from (B, C, g1, p1, g2, p2, ...) to (B, g..., patch part)."""
    grid = [2 + 2 * i for i in range(space)]
    patch = [3 + 2 * i for i in range(space)]
    return [0, *grid, *([*patch, 1] if order == "pqc" else [1, *patch])]


def patchify(x, patch, order):
    B, C, *space = x.shape
    split = [n for size, p in zip(space, patch, strict=True) for n in (size // p, p)]
    grid, width = split[::2], C
    tokens = 1
    for g, p in zip(grid, patch, strict=True):
        tokens, width = tokens * g, width * p
    return x.reshape(B, C, *split).permute(_axes(len(space), order)).reshape(B, tokens, width)


def unpatchify(tokens, patch, grid, order):
    B, _, width = tokens.shape
    C = width
    for p in patch:
        C = C // p
    axes = _axes(len(patch), order)
    sizes = [B, C, *[n for g, p in zip(grid, patch, strict=True) for n in (g, p)]]
    inverse = sorted(range(len(axes)), key=axes.__getitem__)
    image = tokens.reshape([sizes[a] for a in axes]).permute(inverse)
    return image.reshape(B, C, *[g * p for g, p in zip(grid, patch, strict=True)])


def space_to_depth(x, patch, order):
    grid = [size // p for size, p in zip(x.shape[2:], patch, strict=True)]
    tokens = patchify(x, patch, order)
    return tokens.transpose(1, 2).reshape(x.shape[0], tokens.shape[2], *grid)


def depth_to_space(x, patch, order):
    return unpatchify(x.flatten(2).transpose(1, 2), patch, x.shape[2:], order)
