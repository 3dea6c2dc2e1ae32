"""An image's patches times a weight, and tokens times a weight as an image: patches lie in a kernel's scratch alone."""

from math import prod

import torch

from ...core.backend import cpu
from ...core.backend import triton as on_triton
from ...core.check import dims, fail, integers, option, tensor
from ...core.contract import contract, into
from ..patchify import patchify
from . import reference, triton

_LAYOUTS = {1: "B C w", 2: "B C h w", 3: "B C t h w"}
_ORDERS = ("pqc", "cpq")


def _grid(space, patch):
    return [size // p for size, p in zip(space, patch, strict=True)]


def _embed_outputs(x, weight, bias, position, patch):
    op = "patch_embed"
    sizes = dims(op, x=(x, _LAYOUTS[len(patch)]), weight=(weight, "D K"), bias=(bias, "D"), position=(position, "N D"))
    for axis, (size, p) in enumerate(zip(x.shape[2:], patch, strict=True)):
        if size % p:
            fail(op, f"patch wants divisors of the image size {tuple(x.shape[2:])}, got {tuple(patch)}: {size} % {p} on axis {axis + 2}")
    if sizes["K"] != prod(patch) * sizes["C"]:
        fail(op, f"weight wants (D, prod(patch) * C) = (D, {prod(patch) * sizes['C']}), got {tuple(weight.shape)}")
    tokens = prod(_grid(x.shape[2:], patch))
    if position is not None and sizes["N"] != tokens:
        fail(op, f"position wants N = {tokens} tokens, got {tuple(position.shape)}")
    return x.new_empty((sizes["B"], tokens, sizes["D"]))


def _project_outputs(tokens, weight, bias, patch, grid):
    op = "unpatch_project"
    sizes = dims(op, tokens=(tokens, "B N D"), weight=(weight, "K D"), bias=(bias, "K"))
    if sizes["N"] != prod(grid):
        fail(op, f"grid wants a product of N = {sizes['N']} tokens, got {tuple(grid)}")
    if sizes["K"] % prod(patch):
        fail(op, f"patch wants a product that divides the weight's {sizes['K']} rows, got {tuple(patch)}")
    return tokens.new_empty((sizes["B"], sizes["K"] // prod(patch), *(g * p for g, p in zip(grid, patch, strict=True))))


# Both know one order of a patch's elements, (channel, axes of space): whole runs of pixels. Another order is another order of the weight.
PATCH_EMBED = contract("patch_embed(Tensor x, Tensor weight, Tensor? bias, Tensor? position, SymInt[] patch) -> Tensor",
                       outputs=_embed_outputs, reference=reference.patch_embed, module=__name__, autocast=True,
                       backends=(triton.PATCH_EMBED,
                                 cpu("patch_embed", plan=lambda *_: "tokens by blocks, their patches gathered, times packed weights")))
UNPATCH_PROJECT = contract("unpatch_project(Tensor tokens, Tensor weight, Tensor? bias, SymInt[] patch, SymInt[] grid) -> Tensor",
                           outputs=_project_outputs, reference=reference.unpatch_project, module=__name__, autocast=True,
                           backends=(triton.UNPATCH_PROJECT,
                                     cpu("unpatch_project", plan=lambda *_: "tokens by blocks, times packed weights, scattered")))


def _product_outputs(tokens, image, patch, by_tokens):
    op = "patch_product"
    sizes = dims(op, tokens=(tokens, "B N D"), image=(image, _LAYOUTS[len(patch)]))
    D, K = sizes["D"], prod(patch) * sizes["C"]
    if sizes["N"] != prod(_grid(image.shape[2:], patch)):
        fail(op, f"tokens wants one per patch of {tuple(image.shape)} in {tuple(patch)}, got {tuple(tokens.shape)}")
    return tokens.new_empty((D, K) if by_tokens else (K, D)), tokens.new_empty(D), tokens.new_empty(K)


def _product_by_parts(args, outs):
    tokens, image, patch, by_tokens = args
    tokens, patches = tokens.flatten(0, 1), patchify(image, tuple(patch), order="cpq").flatten(0, 1)
    x, weight = (tokens, patches) if by_tokens else (patches, tokens)
    into("linear", outs[:1], x.T, weight.T, None, None)
    torch.sum(tokens, 0, out=outs[1])
    torch.sum(patches, 0, out=outs[2])


# The gradients of both ops' weights and biases. Patches are stored on a GPU alone.
PATCH_PRODUCT = contract("patch_product(Tensor tokens, Tensor image, SymInt[] patch, bool by_tokens) -> (Tensor, Tensor, Tensor)",
                         outputs=_product_outputs, reference=reference.patch_product, module=__name__,
                         backends=(on_triton(_product_by_parts), cpu("patch_product")))


def _embed_backward(ctx, dy):
    if dy is None:
        return (None,) * 5
    (x, weight), wants, patch = ctx.saved_tensors, ctx.wants, ctx.args[4]
    dweight, dbias, _ = PATCH_PRODUCT(dy, x, patch, True) if wants[1] or wants[2] else (None,) * 3
    return (UNPATCH_PROJECT(dy, weight.T, None, patch, _grid(x.shape[2:], patch)) if wants[0] else None,
            dweight, dbias if wants[2] else None, (dy.squeeze(0) if dy.shape[0] == 1 else dy.sum(0)) if wants[3] else None, None)


def _embed_jvp(ctx, dx, dweight, dbias, dposition, *_):
    (x, weight, *_), patch = ctx.saved_tensors, ctx.args[4]
    parts = [PATCH_EMBED(a, b, None, None, patch) for a, b in ((dx, weight), (x, dweight)) if a is not None and b is not None]
    size = (x.shape[0], prod(_grid(x.shape[2:], patch)), weight.shape[0])
    parts += [d.expand(size).clone() for d in (dbias, dposition) if d is not None]
    return sum(parts[1:], parts[0])


def _project_backward(ctx, dy):
    if dy is None:
        return (None,) * 5
    (tokens, weight), wants, patch = ctx.saved_tensors, ctx.wants, ctx.args[3]
    dweight, _, dbias = PATCH_PRODUCT(tokens, dy, patch, False) if wants[1] or wants[2] else (None,) * 3
    return PATCH_EMBED(dy, weight.T, None, None, patch) if wants[0] else None, dweight, dbias if wants[2] else None, None, None


def _project_jvp(ctx, dtokens, dweight, dbias, *_):
    (tokens, weight, *_), options = ctx.saved_tensors, ctx.args[3:]
    parts = [UNPATCH_PROJECT(a, b, None, *options) for a, b in ((dtokens, weight), (tokens, dweight)) if a is not None and b is not None]
    parts += [] if dbias is None else [UNPATCH_PROJECT(tokens[..., :0], weight[:, :0], dbias, *options)]
    return sum(parts[1:], parts[0])


PATCH_EMBED.autograd(save=lambda ctx, args, outs: args[:2], backward=_embed_backward, jvp=_embed_jvp)
UNPATCH_PROJECT.autograd(save=lambda ctx, args, outs: args[:2], backward=_project_backward, jvp=_project_jvp)


PATCH_EMBED.vmap_batch((1, 2, 3))
UNPATCH_PROJECT.vmap_batch((1, 2))
PATCH_PRODUCT.vmap_batch(apart=lambda *_: True)


def _channels_first(x, axis, patch, order):
    """A weight or bias whose `axis` is in `order`, in the contracts' order; unchanged where it does not fit, for the contract to refuse."""
    if order == "cpq" or x.layout is not torch.strided or x.dim() <= axis or x.shape[axis] % prod(patch):
        return x
    return x.unflatten(axis, (prod(patch), x.shape[axis] // prod(patch))).transpose(axis, axis + 1).flatten(axis, axis + 1)


def patch_embed(x, weight, bias=None, position=None, *, patch, order="pqc"):
    """Patches to tokens in one pass: y[b, n] = W (elements of patch n) + bias + position[n]; patches are never stored.

    Shapes   x (B, C, *space), space 1-D to 3-D, any strides; patch an int or one per axis, dividing it; weight (D, prod(patch) * C);
             bias (D,) or None; position (N, D) or None -> y (B, N, D), contiguous
    Order    of the weight's columns, as in `patchify`: "pqc" (row, column, channel), or "cpq": a convolution's weight, flattened
    Dtypes   float32, float16, bfloat16, float64; all equal; computed in float32 (float64 in the reference)
    Grads    x, weight, bias, position; every order
    Raises   ValueError naming the argument, what was wanted and what was given; TypeError for a non-tensor
    Source   Dosovitskiy et al. 2021, equation 1; Peebles & Xie 2023, section 3.2
    """
    op = "patch_embed"
    space = tensor(op, "x", x).dim() - 2
    if space not in _LAYOUTS:
        fail(op, f"x wants 3 to 5 dimensions (B, C, 1 to 3 of space), got {x.dim()}: {tuple(x.shape)}")
    patch, order = integers(op, "patch", patch, space), option(op, "order", order, _ORDERS)
    return PATCH_EMBED(x, _channels_first(tensor(op, "weight", weight), 1, patch, order), bias, position, patch)


def unpatch_project(tokens, weight, bias=None, *, patch, grid, order="pqc"):
    """Tokens to an image in one pass: patch n of sample b is W tokens[b, n] + bias; patches are never stored.

    Shapes   tokens (B, N, D), N = prod(grid); weight (prod(patch) * C, D); bias (prod(patch) * C,) or None; grid one int per axis (1 to 3);
             patch an int or one per axis -> x (B, C, *(grid * patch)), contiguous
    Order    of the weight's rows and the bias, as in `patchify`
    Dtypes   float32, float16, bfloat16, float64; all equal; computed in float32 (float64 in the reference)
    Grads    tokens, weight, bias; every order
    Raises   ValueError naming the argument, what was wanted and what was given; TypeError for a non-tensor
    Source   Peebles & Xie 2023, section 3.2
    """
    op = "unpatch_project"
    tensor(op, "tokens", tokens)
    grid = integers(op, "grid", grid, least=0)
    if len(grid) not in _LAYOUTS:
        fail(op, f"grid wants 1 to 3 ints, got {len(grid)}: {grid}")
    patch, order = integers(op, "patch", patch, len(grid)), option(op, "order", order, _ORDERS)
    weight = _channels_first(tensor(op, "weight", weight), 0, patch, order)
    bias = None if bias is None else _channels_first(tensor(op, "bias", bias), 0, patch, order)
    return UNPATCH_PROJECT(tokens, weight, bias, patch, grid)
