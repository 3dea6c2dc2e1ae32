"""The matrix product of a linear layer, with the same bits whatever the number of threads: what composed ops are made of."""

import torch

from ...core import backend
from ...core.check import dims, fail, tensor
from ...core.contract import contract
from . import reference, triton


def _outputs(x, weight):
    sizes = dims("linear", x=(x, "M K"), weight=(weight, "N K"))
    return x.new_empty((sizes["M"], sizes["N"]))


LINEAR = contract("linear(Tensor x, Tensor weight) -> Tensor", outputs=_outputs, reference=reference.linear, module=__name__, autocast=True,
                  # On a GPU torch's own product, until Triton's is known to be faster there.
                  backends=(backend.cpu("linear", plan=lambda *_: "register tiles over packed weights, one order of addition"),
                            backend.reference(reference.linear), triton.FORWARD))


def _backward(ctx, dy):
    x, weight = ctx.saved_tensors
    if dy is None:
        return None, None
    return LINEAR(dy, weight.T) if ctx.wants[0] else None, LINEAR(dy.T, x.T) if ctx.wants[1] else None


def _jvp(ctx, dx, dweight):
    x, weight = ctx.saved_tensors
    parts = [LINEAR(a, b) for a, b in ((dx, weight), (x, dweight)) if a is not None and b is not None]
    return sum(parts[1:], parts[0])


LINEAR.autograd(save=lambda ctx, args, outs: args, backward=_backward, jvp=_jvp)


def _vmap(info, in_dims, x, weight):
    if in_dims[1] is None:
        x = x.movedim(in_dims[0], 0)
        return LINEAR(x.flatten(0, 1), weight).unflatten(0, x.shape[:2]), 0
    xs = (x,) * info.batch_size if in_dims[0] is None else x.unbind(in_dims[0])
    return torch.stack([LINEAR(a, w) for a, w in zip(xs, weight.unbind(in_dims[1]), strict=True)]), 0


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
    if bias is not None:
        dims("linear", weight=(tensor("linear", "weight", weight), "N K"), bias=(bias, "N"))
    y = LINEAR(x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0), weight)
    y = y if bias is None else y + bias.to(y.dtype)  # autocast may have cast
    return y if x.dim() == 2 else y.view(*x.shape[:-1], weight.shape[0])
