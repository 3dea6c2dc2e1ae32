"""Images to rows of patches and back: the same elements in another order."""

from math import prod

from ...core.backend import cpu, cuda
from ...core.check import dims, fail, integers, option, tensor
from ...core.contract import contract
from . import reference, triton

_LAYOUTS = {1: "B C w", 2: "B C h w", 3: "B C t h w"}
_ORDERS = ("pqc", "cpq")


def _grid(op, x, patch):
    dims(op, x=(x, _LAYOUTS[len(patch)]))
    for axis, (size, p) in enumerate(zip(x.shape[2:], patch, strict=True)):
        if size % p:
            fail(op, f"patch wants divisors of the image size {tuple(x.shape[2:])}, got {tuple(patch)}: {size} % {p} on axis {axis + 2}")
    return [size // p for size, p in zip(x.shape[2:], patch, strict=True)]


def _patchify_outputs(x, patch, order):
    return x.new_empty((x.shape[0], prod(_grid("patchify", x, patch)), prod(patch) * x.shape[1]))


def _space_to_depth_outputs(x, patch, order):
    grid = _grid("space_to_depth", x, patch)
    return x.new_empty((x.shape[0], prod(patch) * x.shape[1], *grid))


def _depth_to_space_outputs(x, patch, order):
    op = "depth_to_space"
    dims(op, x=(x, _LAYOUTS[len(patch)]))
    if x.shape[1] % prod(patch):
        fail(op, f"patch wants a product that divides the {x.shape[1]} channels of x, got {tuple(patch)}")
    return x.new_empty((x.shape[0], x.shape[1] // prod(patch), *(g * p for g, p in zip(x.shape[2:], patch, strict=True))))


def _unpatchify_outputs(tokens, patch, grid, order):
    op = "unpatchify"
    sizes = dims(op, tokens=(tokens, "B N D"))
    if sizes["N"] != prod(grid):
        fail(op, f"grid wants a product of N = {sizes['N']} tokens, got {tuple(grid)}")
    if sizes["D"] % prod(patch):
        fail(op, f"patch wants a product that divides D = {sizes['D']}, got {tuple(patch)}")
    return tokens.new_empty((sizes["B"], sizes["D"] // prod(patch), *(g * p for g, p in zip(grid, patch, strict=True))))


def _cuda(name, elements):
    """elements(*args): of one patch; the kernel holds a patch in shared memory."""

    def refuse(*args):
        return None if elements(*args) <= 8192 else f"takes patches of at most 8192 elements, got {elements(*args)}"

    return cuda(name, refuse=refuse, plan=lambda *_: "tiles of patches through shared memory, 16 bytes at a time where addresses allow")


PATCHIFY = contract("patchify(Tensor x, SymInt[] patch, str order) -> Tensor", outputs=_patchify_outputs, reference=reference.patchify,
                    backends=(_cuda("patchify", lambda x, patch, _: x.shape[1] * prod(patch)), triton.PATCHIFY, cpu("patchify")),
                    module=__name__, entries=("patchify_eager",))
UNPATCHIFY = contract("unpatchify(Tensor tokens, SymInt[] patch, SymInt[] grid, str order) -> Tensor", outputs=_unpatchify_outputs,
                      reference=reference.unpatchify,
                      backends=(_cuda("unpatchify", lambda tokens, *_: tokens.shape[2]), triton.UNPATCHIFY, cpu("unpatchify")),
                      module=__name__, entries=("unpatchify_eager",))
SPACE_TO_DEPTH = contract("space_to_depth(Tensor x, SymInt[] patch, str order) -> Tensor", outputs=_space_to_depth_outputs,
                          reference=reference.space_to_depth,
                          backends=(_cuda("space_to_depth", lambda x, patch, _: x.shape[1] * prod(patch)), triton.SPACE_TO_DEPTH,
                                    cpu("space_to_depth")), module=__name__)
DEPTH_TO_SPACE = contract("depth_to_space(Tensor x, SymInt[] patch, str order) -> Tensor", outputs=_depth_to_space_outputs,
                          reference=reference.depth_to_space,
                          backends=(_cuda("depth_to_space", lambda x, *_: x.shape[1]), triton.DEPTH_TO_SPACE, cpu("depth_to_space")),
                          module=__name__)


def _save_grid(ctx, args, outs):
    ctx.grid = [size // p for size, p in zip(args[0].shape[2:], args[1], strict=True)]
    return ()


# A permutation of elements is linear, and its transpose is its inverse.
PATCHIFY.autograd(
    save=_save_grid,
    backward=lambda ctx, dy: (None if dy is None else UNPATCHIFY(dy, ctx.args[1], ctx.grid, ctx.args[2]), None, None),
    jvp=lambda ctx, dx, *_: PATCHIFY(dx, *ctx.args[1:]))
UNPATCHIFY.autograd(
    save=lambda ctx, args, outs: (),
    backward=lambda ctx, dy: (None if dy is None else PATCHIFY(dy, ctx.args[1], ctx.args[3]), None, None, None),
    jvp=lambda ctx, dtokens, *_: UNPATCHIFY(dtokens, *ctx.args[1:]))
for _one, _other in ((SPACE_TO_DEPTH, DEPTH_TO_SPACE), (DEPTH_TO_SPACE, SPACE_TO_DEPTH)):
    _one.autograd(
        save=lambda ctx, args, outs: (),
        backward=lambda ctx, dy, other=_other: (None if dy is None else other(dy, *ctx.args[1:]), None, None),
        jvp=lambda ctx, dx, *_, one=_one: one(dx, *ctx.args[1:]))


for _made in (PATCHIFY, UNPATCHIFY, SPACE_TO_DEPTH, DEPTH_TO_SPACE):
    _made.vmap_batch()


def patchify(x, patch, *, order="pqc"):
    """Image to tokens, one per patch, row-major over the grid: y[b, n] = the elements of patch n.

    Shapes   x (B, C, *space), space 1-D to 3-D, any strides; patch an int or one per axis, dividing it
             -> y (B, N, prod(patch) * C), contiguous
    Order    "pqc": row, column, channel within a token (DiT, RIN); "cpq": channel, row, column (convolution weights, pixel_unshuffle)
    Dtypes   float32, float16, bfloat16, float64; elements are moved, not changed
    Grads    x; every order
    Raises   ValueError naming the argument, what was wanted and what was given; TypeError for a non-tensor
    Source   Dosovitskiy et al. 2021, section 3.1; Peebles & Xie 2023, section 3.2
    """
    space = tensor("patchify", "x", x).dim() - 2
    if space not in _LAYOUTS:
        fail("patchify", f"x wants 3 to 5 dimensions (B, C, 1 to 3 of space), got {x.dim()}: {tuple(x.shape)}")
    args = (x, integers("patchify", "patch", patch, space), option("patchify", "order", order, _ORDERS))
    tokens = PATCHIFY.eager(args)
    return PATCHIFY(*args) if tokens is None else tokens


def unpatchify(tokens, patch, grid, *, order="pqc"):
    """Tokens to image, the inverse of `patchify`: unpatchify(patchify(x, patch), patch, grid) = x.

    Shapes   tokens (B, N, prod(patch) * C), N = prod(grid); grid one int per axis (1 to 3); patch an int or one per axis
             -> x (B, C, *(grid * patch)), contiguous
    Order    as in `patchify`
    Dtypes   float32, float16, bfloat16, float64; elements are moved, not changed
    Grads    tokens; every order
    Raises   ValueError naming the argument, what was wanted and what was given; TypeError for a non-tensor
    Source   Peebles & Xie 2023, section 3.2
    """
    tensor("unpatchify", "tokens", tokens)
    grid = integers("unpatchify", "grid", grid, least=0)
    if len(grid) not in _LAYOUTS:
        fail("unpatchify", f"grid wants 1 to 3 ints, got {len(grid)}: {grid}")
    args = (tokens, integers("unpatchify", "patch", patch, len(grid)), grid, option("unpatchify", "order", order, _ORDERS))
    x = UNPATCHIFY.eager(args)
    return UNPATCHIFY(*args) if x is None else x


def _image_options(op, x, patch, order):
    space = tensor(op, "x", x).dim() - 2
    if space not in _LAYOUTS:
        fail(op, f"x wants 3 to 5 dimensions (B, C, 1 to 3 of space), got {x.dim()}: {tuple(x.shape)}")
    return integers(op, "patch", patch, space), option(op, "order", order, _ORDERS)


def space_to_depth(x, patch, *, order="pqc"):
    """Image to a smaller image of patches: y[b, :, g] = the elements of patch g; with "cpq" as torch's pixel_unshuffle.

    Shapes   x (B, C, *space), space 1-D to 3-D, any strides; patch an int or one per axis, dividing it
             -> y (B, prod(patch) * C, *(space / patch)), contiguous
    Order    of y's channels: "pqc" (row, column, channel) or "cpq" (channel, row, column), as in `patchify`
    Dtypes   float32, float16, bfloat16, float64; elements are moved, not changed
    Grads    x; every order
    Raises   ValueError naming the argument, what was wanted and what was given; TypeError for a non-tensor
    Source   Luhman & Luhman 2022 (patched U-Net); Shi et al. 2016 (pixel shuffle)
    """
    return SPACE_TO_DEPTH(x, *_image_options("space_to_depth", x, patch, order))


def depth_to_space(x, patch, *, order="pqc"):
    """The inverse of `space_to_depth`; with "cpq" as torch's pixel_shuffle.

    Shapes   x (B, prod(patch) * C, *grid), grid 1-D to 3-D, any strides; patch an int or one per axis
             -> y (B, C, *(grid * patch)), contiguous
    Order    of x's channels, as in `space_to_depth`
    Dtypes   float32, float16, bfloat16, float64; elements are moved, not changed
    Grads    x; every order
    Raises   ValueError naming the argument, what was wanted and what was given; TypeError for a non-tensor
    Source   Luhman & Luhman 2022 (patched U-Net); Shi et al. 2016 (pixel shuffle)
    """
    return DEPTH_TO_SPACE(x, *_image_options("depth_to_space", x, patch, order))
