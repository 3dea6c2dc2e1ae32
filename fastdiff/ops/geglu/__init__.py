"""The gated linear unit of a transformer's feed-forward layer, with GELU for its gate."""

from ...core.backend import cpu
from ...core.check import dims, fail, option, tensor
from ...core.contract import contract
from . import reference, triton


def _layout(x):
    return " ".join(f"axis{i}" for i in range(x.dim()))


def _outputs(x, approximate):
    dims("geglu", x=(x, _layout(x)))
    if x.shape[-1] % 2:
        fail("geglu", f"x wants an even last axis, got {tuple(x.shape)}")
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


def _backward_outputs(dy, x, approximate):
    op = "geglu_backward"
    dims(op, x=(x, _layout(x)))
    if dy.shape != (*x.shape[:-1], x.shape[-1] // 2) or dy.dtype != x.dtype or dy.device != x.device:
        fail(op, f"dy wants half of x, {tuple(x.shape)} of {x.dtype} on {x.device}, got {tuple(dy.shape)} of {dy.dtype} on {dy.device}")
    return x.new_empty(x.shape)


GEGLU = contract("geglu(Tensor x, str approximate) -> Tensor", outputs=_outputs, reference=reference.geglu,
                 backends=(triton.FORWARD, cpu("geglu")), module=__name__, entries=("geglu_eager",))
BACKWARD = contract("geglu_backward(Tensor dy, Tensor x, str approximate) -> Tensor", outputs=_backward_outputs,
                    reference=reference.geglu_backward, backends=(triton.BACKWARD, cpu("geglu_backward")), module=__name__)
GEGLU.autograd(save=lambda ctx, args, outs: args[:1],
               backward=lambda ctx, dy: (None if dy is None else BACKWARD(dy, *ctx.saved_tensors, ctx.args[1]), None))
GEGLU.vmap(lambda info, in_dims, x, approximate: (GEGLU(x.movedim(in_dims[0], 0), approximate), 0))


def _backward_vmap(info, in_dims, dy, x, approximate):
    whole = lambda t, d: t.unsqueeze(0).expand(info.batch_size, *t.shape) if d is None else t.movedim(d, 0)
    return BACKWARD(whole(dy, in_dims[0]), whole(x, in_dims[1]), approximate), 0


BACKWARD.vmap(_backward_vmap)


def geglu(x, *, approximate="none"):
    """y = a gelu(b), [a | b] = x the halves of the last axis.

    Shapes   x (..., 2 F), any strides -> y (..., F), contiguous
    Gelu     approximate="none": b (1 + erf(b / sqrt 2)) / 2; "tanh": b (1 + tanh(sqrt(2 / pi) (b + 0.044715 b^3))) / 2
    Dtypes   float32, float16, bfloat16, float64; computed in float32 (float64 in the reference)
    Grads    x; every order
    Raises   ValueError naming the argument, what was wanted and what was given; TypeError for a non-tensor
    Source   Shazeer 2020; Rombach et al. 2022 (the U-Net's transformer blocks)
    """
    if tensor("geglu", "x", x).dim() == 0:
        fail("geglu", "x wants at least one dimension, got a scalar")
    args = (x, option("geglu", "approximate", approximate, ("none", "tanh")))
    y = GEGLU.eager(args)
    return GEGLU(*args) if y is None else y
