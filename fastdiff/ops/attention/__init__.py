"""Softmax attention, with the sizes of either side free: reads, writes and balanced shapes."""

import torch

from ...core import native
from ...core.backend import cpu, cuda
from ...core.check import dims, fail, flag, lengths, lengths_within, tensor
from ...core.contract import contract
from . import reference, triton


def _check(op, q, k, v, bias, key_lengths):
    sizes = dims(op, q=(q, "B H M E"), k=(k, "B H N E"), v=(v, "B H N E"))
    if bias is not None:
        dims(op, q=(q, "B H M E"), bias=(bias, "b h m n"))
        for axis, size, full in zip("BHMN", bias.shape, (*q.shape[:3], sizes["N"]), strict=True):
            if size not in (1, full):
                fail(op, f"bias wants sizes that broadcast to (B, H, M, N) = {(*q.shape[:3], sizes['N'])}, got {tuple(bias.shape)}: {axis}")
    lengths(op, key_lengths, q)
    return sizes


def _empty_heads(x):
    """Like x (B, H, S, E), dense; in (B, S, H, E) memory when x is, so that the projection after it needs no copy."""
    B, H, S, E = x.shape
    if x.stride(1) < x.stride(2):
        return x.new_empty((B, S, H, E)).transpose(1, 2)
    return x.new_empty((B, H, S, E))


def _outputs(q, k, v, bias, key_lengths, causal, scale):
    _check("attention", q, k, v, bias, key_lengths)
    wide = torch.float64 if q.dtype is torch.float64 else torch.float32
    rounds = q.shape[3] if q.dtype.itemsize == 2 else 0
    return (_empty_heads(q), q.new_empty((*q.shape[:3], rounds)), q.new_empty(q.shape[:3], dtype=wide),
            q.new_empty(q.shape[:3], dtype=wide))


def _backward_outputs(dout, dlse, q, k, v, bias, key_lengths, out, out_low, lse, lse_low, causal, scale, bias_grad,
                      partial):
    op = "attention_backward"
    _check(op, q, k, v, bias, key_lengths)
    dims(op, q=(q, "B H M E"), dout=(dout, "B H M E"), out=(out, "B H M E"))
    dims(op, out_low=(out_low, "B H M E"))  # E = 0 beside float32
    dims(op, lse=(lse, "B H M"), lse_low=(lse_low, "B H M"), dlse=(dlse, "B H M"))  # float32 beside half-precision q
    return _empty_heads(q), _empty_heads(k), _empty_heads(v), q.new_empty(bias.shape if bias_grad else (0,))


def _cpu_plan(q, k, v, causal, backward):
    width = max(q.shape[3], v.shape[3])
    plan = native.op("cpu", "attention_plan")(*q.shape[:3], k.shape[2], width, causal, backward)
    queries, rows, keys, chunk, query_block, key_block = plan
    side = "neither side is split" if queries == keys == 1 else (
        f"queries in {queries} pieces of {rows}, keys in {keys} of {chunk}{', merged in order' if backward or keys > 1 else ''}")
    return f"{q.shape[0] * q.shape[1] * queries * keys} work items: {side}; scores in blocks of {query_block} x {key_block}"


def _cuda_refuses(q, k, v, largest):
    E, V = q.shape[3], v.shape[3]
    if E != V:
        return f"takes values as wide as keys, got {V} and {E}"
    piece = 16 // q.element_size()
    if not 1 <= E <= largest or E % piece:
        return f"takes head sizes that are multiples of {piece} and at most {largest}, got {E}"
    rows = max(q.shape[2], k.shape[2])
    return None if rows < 2**30 else f"takes fewer than 2^30 queries and keys, got {rows}"


def _cuda_refuses_backward(dout, dlse, q, k, v, *rest):
    if rest[-2]:
        return "takes no bias that wants a gradient"
    return _cuda_refuses(q, k, v, 64 if q.dtype is torch.float32 else 128)


# The CUDA kernels have run on the CPU only (tests/native), never yet on a GPU.
ATTENTION = contract(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? key_lengths, bool causal, float? scale) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    outputs=_outputs, values=lambda q, k, v, bias, key_lengths, *_: lengths_within("attention", key_lengths, k.shape[2]),
    reference=reference.attention,
    backends=(cuda("attention", refuse=lambda q, k, v, *_: _cuda_refuses(q, k, v, 128)), triton.FORWARD,
              cpu("attention", plan=lambda q, k, v, *rest: _cpu_plan(q, k, v, rest[2], False))),
    module=__name__, autocast=True,
    entries=("attention_eager", "attention_with_lse_eager"))
BACKWARD = contract(
    "attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? key_lengths, Tensor out, "
    "Tensor out_low, Tensor lse, Tensor lse_low, bool causal, float? scale, bool bias_grad, bool partial) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    outputs=_backward_outputs, reference=reference.attention_backward, module=__name__,
    backends=(cuda("attention_backward", refuse=_cuda_refuses_backward), triton.BACKWARD,
              cpu("attention_backward", plan=lambda dout, dlse, q, k, v, *rest: _cpu_plan(q, k, v, rest[6], True))))


def _save(ctx, args, outs):
    ctx.mark_non_differentiable(outs[1], outs[3])
    return (*args[:5], *outs)


def _backward(ctx, dout, _, dlse, __):
    q, k, v, bias, key_lengths, out, out_low, lse, lse_low = ctx.saved_tensors
    wanted = ctx.wants[:4]
    if (dout is None and dlse is None) or not any(wanted):
        return (None,) * 7
    dout = torch.zeros_like(out) if dout is None else dout
    grads = BACKWARD(dout, dlse, q, k, v, bias, key_lengths, out, out_low, lse, lse_low, *ctx.args[5:], wanted[3], False)
    return *(g if w else None for g, w in zip(grads, wanted, strict=True)), None, None, None


def _jvp(ctx, dq, dk, dv, dbias, *rest):
    q, k, v, bias, key_lengths, *_, lse, _ = ctx.saved_tensors
    p = reference.softmax(reference.scores(q, k, bias, key_lengths, *ctx.args[5:]))
    scale = max(q.shape[3], 1) ** -0.5 if ctx.args[6] is None else ctx.args[6]
    ds = torch.zeros_like(p)
    if dq is not None:
        ds = ds + scale * (dq @ k.transpose(-1, -2))
    if dk is not None:
        ds = ds + scale * (q @ dk.transpose(-1, -2))
    if dbias is not None:
        ds = ds + dbias
    dlse = (p * ds).sum(-1, keepdim=True)
    dout = (p * (ds - dlse)) @ v
    return dout if dv is None else dout + p @ dv, None, dlse[..., 0].to(lse.dtype), None


ATTENTION.autograd(save=_save, backward=_backward, jvp=_jvp)


def _fold(x, dim, mapped, B):
    """The mapped axis joins the batch: (mapped * B, ...), for an argument that may not be mapped, or has 1 for B."""
    if x is None:
        return None
    x = x.unsqueeze(0) if dim is None else x.movedim(dim, 0)
    return x.expand(mapped, B, *x.shape[2:]).flatten(0, 1)


def _vmap(info, in_dims, *args):
    q, V = args[0], info.batch_size
    B = q.shape[0] if in_dims[0] is None else q.movedim(in_dims[0], 0).shape[1]
    outs = ATTENTION(*(_fold(x, d, V, B) for x, d in zip(args[:5], in_dims[:5], strict=True)), *args[5:])
    return tuple(x.unflatten(0, (V, B)) for x in outs), (0, 0, 0, 0)


def _vmap_backward(info, in_dims, *args):
    dout, bias, V = args[0], args[5], info.batch_size
    B = dout.shape[0] if in_dims[0] is None else dout.movedim(in_dims[0], 0).shape[1]
    *grads, dbias = BACKWARD(*(_fold(x, d, V, B) for x, d in zip(args[:11], in_dims[:11], strict=True)), *args[11:])
    grads = [x.unflatten(0, (V, B)) for x in grads]
    if not args[-2]:
        return (*grads, dbias), (0, 0, 0, None)
    dbias = dbias.unflatten(0, (V, B))
    shared = (bias.shape if in_dims[5] is None else bias.movedim(in_dims[5], 0).shape[1:])[0] == 1
    return (*grads, dbias.sum(1, keepdim=True) if shared else dbias), (0, 0, 0, 0)


ATTENTION.vmap(_vmap)
BACKWARD.vmap(_vmap_backward)


def _options(bias, causal, scale):
    flag("attention", "causal", causal)
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, int | float | torch.SymFloat)):
        raise TypeError(f"attention: scale wants a float or None, got {scale!r}")
    if bias is not None and tensor("attention", "bias", bias).dim() < 4:
        bias = bias[(None,) * (4 - bias.dim())]
    return bias, causal, scale


def attention(q, k, v, *, bias=None, key_lengths=None, causal=False, scale=None):
    """Softmax attention per head: out = softmax(scale q k^T + bias) v.

    Shapes   q (B, H, M, E); k, v (B, H, N, E); any strides, transposed (B, S, H, E) memory is read in place -> out (B, H, M, E) in q's
             memory order; bias broadcastable to (B, H, M, N), -inf hides a key; key_lengths (B,) int64 in [0, N] hides keys from there on
    Options  causal: query m sees keys n <= m + N - M (the last query is aligned with the last key); scale: 1 / sqrt(E) unless given
    Dtypes   float32, float16, bfloat16, float64; all equal; computed in float32 (float64 in the reference). A query that sees no key gets 0
    Grads    q, k, v, bias; first order by kernels that recompute the scores, higher orders and forward mode through the reference
    Raises   ValueError naming the argument, what was wanted and what was given; TypeError for a non-tensor
    Source   Vaswani et al. 2017, section 3.2.1; online softmax of Milakov & Gimelshein 2018
    """
    if bias is not None or causal is not False or scale is not None:
        bias, causal, scale = _options(bias, causal, scale)
    out = ATTENTION.eager((q, k, v, causal, scale)) if bias is None and key_lengths is None else None
    return ATTENTION(q, k, v, bias, key_lengths, causal, scale)[0] if out is None else out


def attention_with_lse(q, k, v, *, bias=None, key_lengths=None, causal=False, scale=None):
    """`attention` and the log-sum-exp of its scores: (out, lse), lse = log sum_n exp(scale q k_n + bias_n).

    Shapes   as in `attention`; lse (B, H, M), natural logarithm, -inf for a query that sees no key
    Dtypes   as in `attention`; lse float32 (float64 for float64 inputs)
    Grads    through both results
    Raises   as in `attention`
    Source   Dao et al. 2022, section 3.1; merge partial results with `merge_attention`
    """
    if bias is not None or causal is not False or scale is not None:
        bias, causal, scale = _options(bias, causal, scale)
    if bias is None and key_lengths is None:
        both = ATTENTION.eager((q, k, v, causal, scale), entry=1)
        if both is not None and both[0] is not None:
            return both
    out, _, lse, _ = ATTENTION(q, k, v, bias, key_lengths, causal, scale)
    return out, lse
