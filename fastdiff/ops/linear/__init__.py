"""The matrix product of a linear layer, with the same bits whatever the number of threads: what composed ops are made of."""

import torch

from ...core import backend
from ...core.check import dims, fail, tensor
from ...core.contract import contract
from . import reference, triton


def _outputs(x, weight, bias, added):
    sizes = dims("linear", x=(x, "M K"), weight=(weight, "N K"), bias=(bias, "N"), added=(added, "M N"))
    return x.new_empty((sizes["M"], sizes["N"]))


LINEAR = contract("linear(Tensor x, Tensor weight, Tensor? bias, Tensor? added) -> Tensor", outputs=_outputs, reference=reference.linear,
                  module=__name__, autocast=True,
                  # On a GPU torch's own product, until Triton's is known to be faster there.
                  backends=(backend.cpu("linear", plan=lambda *_: "register tiles over packed weights, one order of addition"),
                            backend.reference(reference.linear), triton.FORWARD))


def _backward(ctx, dy):
    if dy is None:
        return (None,) * 4
    (x, weight, *_), wants = ctx.saved_tensors, ctx.wants
    return (LINEAR(dy, weight.T, None, None) if wants[0] else None, LINEAR(dy.T, x.T, None, None) if wants[1] else None,
            dy.sum(0) if wants[2] else None, dy if wants[3] else None)


def _jvp(ctx, dx, dweight, dbias, dadded):
    """dx W^T + x dW^T as one product, [dx, x] [W, dW]^T: two would be rounded, and could overflow, each by itself."""
    x, weight, *_ = ctx.saved_tensors
    factors = [(a, b) for a, b in ((dx, weight), (x, dweight)) if a is not None and b is not None] or [(x[:, :0], weight[:, :0])]
    return LINEAR(*(torch.cat(side, 1) for side in zip(*factors, strict=True)), dbias, dadded)


LINEAR.autograd(save=lambda ctx, args, outs: args, backward=_backward, jvp=_jvp)


def _vmap(info, in_dims, x, weight, bias, added):
    if in_dims[1:] == (None, None, None) and added is None:
        x = x.movedim(in_dims[0], 0)
        return LINEAR(x.flatten(0, 1), weight, bias, None).unflatten(0, x.shape[:2]), 0
    each = ((y,) * info.batch_size if d is None else y.unbind(d) for y, d in zip((x, weight, bias, added), in_dims, strict=True))
    return torch.stack([LINEAR(*args) for args in zip(*each, strict=True)]), 0


LINEAR.vmap(_vmap)


def linear(x, weight, bias=None):
    """y = x W^T + b, as torch.nn.functional.linear, with the same bits for any number of threads.

    Shapes   x (..., K), weight (N, K), any strides; bias (N,) or None -> y (..., N), contiguous
    Dtypes   float32, float16, bfloat16, float64; all equal; computed in float32 (float64 in the reference)
    Grads    x, weight, bias; every order
    Raises   ValueError naming the argument, what was wanted and what was given; TypeError for a non-tensor
    Source   van Zee & van de Geijn 2015 (register tiles over packed panels)
    """
    if tensor("linear", "x", x).dim() == 0:
        fail("linear", "x wants at least one dimension, got a scalar")
    rows = x if x.dim() == 2 else x.unsqueeze(0) if x.dim() == 1 else x.flatten(0, -2)
    y = LINEAR(rows, weight, bias, None)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], weight.shape[0])
