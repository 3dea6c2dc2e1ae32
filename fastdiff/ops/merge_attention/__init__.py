"""Partial attentions over disjoint key sets, put together exactly."""

import torch

from ...core.backend import cpu
from ...core.check import dims, fail
from ...core.contract import contract
from . import reference, triton


def _outputs(out_a, lse_a, out_b, lse_b):
    op = "merge_attention"
    dims(op, out_a=(out_a, "B H M E"), out_b=(out_b, "B H M E"))
    sizes = dims(op, lse_a=(lse_a, "B H M"), lse_b=(lse_b, "B H M"))
    if tuple(sizes.values()) != tuple(out_a.shape[:3]):
        fail(op, f"lse_a wants the shape {tuple(out_a.shape[:3])} of out_a without E, got {tuple(lse_a.shape)}")
    wanted = torch.float64 if out_a.dtype is torch.float64 else torch.float32
    if lse_a.dtype is not wanted:
        fail(op, f"lse_a wants {wanted} beside out_a of {out_a.dtype}, got {lse_a.dtype}")
    if lse_a.device != out_a.device:
        fail(op, f"lse_a is on {lse_a.device}, but out_a is on {out_a.device}")
    return out_a.new_empty(out_a.shape), lse_a.new_empty(lse_a.shape)


MERGE = contract("merge_attention(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor, Tensor)", outputs=_outputs,
                 reference=reference.merge_attention, backends=(triton.FORWARD, cpu("merge_attention")), module=__name__,
                 entry="merge_attention_eager")


def _fold(x, dim, mapped):
    return (x.unsqueeze(0).expand(mapped, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1)


def _vmap(info, in_dims, *args):
    outs = MERGE(*(_fold(x, d, info.batch_size) for x, d in zip(args, in_dims, strict=True)))
    return tuple(x.unflatten(0, (info.batch_size, -1)) for x in outs), (0, 0)


MERGE.vmap(_vmap)


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
