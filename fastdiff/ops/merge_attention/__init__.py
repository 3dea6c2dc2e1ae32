"""Partial attentions over disjoint key sets, put together exactly."""

import torch

from ...core.backend import cpu
from ...core.check import dims, fail
from ...core.contract import contract
from . import reference, triton


def _check(op, out_a, lse_a, out_b, lse_b):
    dims(op, out_a=(out_a, "B H M E"), out_b=(out_b, "B H M E"))
    sizes = dims(op, lse_a=(lse_a, "B H M"), lse_b=(lse_b, "B H M"))
    if tuple(sizes.values()) != tuple(out_a.shape[:3]):
        fail(op, f"lse_a wants the shape {tuple(out_a.shape[:3])} of out_a without E, got {tuple(lse_a.shape)}")
    wanted = torch.float64 if out_a.dtype is torch.float64 else torch.float32
    if lse_a.dtype is not wanted:
        fail(op, f"lse_a wants {wanted} beside out_a of {out_a.dtype}, got {lse_a.dtype}")
    if lse_a.device != out_a.device:
        fail(op, f"lse_a is on {lse_a.device}, but out_a is on {out_a.device}")


def _outputs(*args):
    _check("merge_attention", *args)
    return tuple(x.new_empty(x.shape) for x in args[:2])


def _backward_outputs(dout, dlse, out_a, lse_a, out_b, lse_b):
    op = "merge_attention_backward"
    _check(op, out_a, lse_a, out_b, lse_b)
    dims(op, out_a=(out_a, "B H M E"), dout=(dout, "B H M E"))
    dims(op, lse_a=(lse_a, "B H M"), dlse=(dlse, "B H M"))
    return tuple(x.new_empty(x.shape) for x in (out_a, lse_a, out_b, lse_b))


MERGE = contract("merge_attention(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor, Tensor)", outputs=_outputs,
                 reference=reference.merge_attention, backends=(triton.FORWARD, cpu("merge_attention")), module=__name__,
                 entries=("merge_attention_eager",))
BACKWARD = contract(
    "merge_attention_backward(Tensor dout, Tensor? dlse, Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    outputs=_backward_outputs, reference=reference.merge_attention_backward,
    backends=(triton.BACKWARD, cpu("merge_attention_backward")), module=__name__)


def _backward(ctx, dout, dlse):
    if dout is None and dlse is None:
        return (None,) * 4
    args = ctx.saved_tensors
    return BACKWARD(torch.zeros_like(args[0]) if dout is None else dout, dlse, *args)


def _jvp(ctx, *tangents):
    out_a, lse_a, out_b, lse_b = args = ctx.saved_tensors
    da, dlse_a, db, dlse_b = (torch.zeros_like(x) if d is None else d for d, x in zip(tangents, args, strict=True))
    a, b, _ = reference.weights(lse_a, lse_b)
    spread = lambda w: w.unsqueeze(-1).to(out_a.dtype)
    return spread(a) * da + spread(b) * db + spread(a * b * (dlse_a - dlse_b)) * (out_a - out_b), a * dlse_a + b * dlse_b


MERGE.autograd(save=lambda ctx, args, outs: args, backward=_backward, jvp=_jvp)


MERGE.vmap_batch()
BACKWARD.vmap_batch()


def merge_attention(out_a, lse_a, out_b, lse_b):
    """Attention over the union of two disjoint key sets: out = w_a out_a + w_b out_b, w = exp(lse_a), exp(lse_b) normalised to sum to 1.

    Shapes   out_a, out_b (B, H, M, E); lse_a, lse_b (B, H, M) -> out (B, H, M, E), lse (B, H, M), contiguous
    Dtypes   out float32, float16, bfloat16 with lse float32; float64 with lse float64. A side with lse = -inf has no weight; two such
             sides give out = 0, lse = -inf
    Grads    all four; every order
    Raises   ValueError naming the argument, what was wanted and what was given; TypeError for a non-tensor
    Source   Dao et al. 2022, section 3.1
    """
    args = (out_a, lse_a, out_b, lse_b)
    merged = MERGE.eager(args)
    return MERGE(*args) if merged is None or merged[0] is None else merged
