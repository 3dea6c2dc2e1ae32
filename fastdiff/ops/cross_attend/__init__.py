"""A cross-attention layer as one op: reads of few queries over a long source, writes of many targets from a short one."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ...core import backend, jit, native
from ...core.check import dims, fail, flag, integers, lengths, lengths_within, number, pair, tensor
from ...core.contract import contract, into, without_autocast
from ...core.softmax import LOW
from . import reference, triton

_TENSORS = ("target", "source", "q_weight", "k_weight", "v_weight", "out_weight", "q_bias", "k_bias", "v_bias", "out_bias", "target_norm_0",
            "target_norm_1", "source_norm_0", "source_norm_1")
_LAYOUTS = dict(zip(_TENSORS, ("B M D", "B N C", "A D", "A C", "V C", "O V", "A", "A", "V", "O", "D", "D", "C", "C"), strict=True))
_SCHEMA = ", ".join(f"Tensor{'?' if i > 5 else ''} {name}" for i, name in enumerate(_TENSORS)) + ", Tensor? key_lengths"


def _check(op, args, key_lengths, heads, residual):
    named = dict(zip(_TENSORS, args, strict=True))
    sizes = dims(op, **{name: (x, _LAYOUTS[name]) for name, x in named.items()})
    for axis, name in (("A", "q_weight"), ("V", "v_weight")):
        if sizes[axis] % heads:
            fail(op, f"heads wants a divisor of {name}'s {sizes[axis]} rows, got {heads}")
    if residual and sizes["O"] != sizes["D"]:
        fail(op, f"out_weight wants O = D = {sizes['D']} rows for the residual, got {tuple(named['out_weight'].shape)}")
    lengths(op, key_lengths, named["target"])
    return sizes


def _own_linear(x, weight, bias, added, out):
    y = out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
    into("linear", (y.view(x.shape[0], weight.shape[0]),), x, weight, bias, added)
    return out if y is out else out.copy_(y)


def _torch_linear(x, weight, bias, added, out):
    y = F.linear(x, weight, bias)
    return out.copy_((y if added is None else y.float().add_(added)).view(out.shape))


class _Means(NamedTuple):
    """What the parts of the long side are computed with.

    linear(x, weight, bias, added, out): x W^T + bias + added into `out`, whose dtype is added's and may be another than x's. chunk: numbers
    in one projection of a part.
    """

    linear: Callable
    chunk: int


# On a CPU what a part needs stays in cache. On a GPU a part fills the chip.
_CPU, _GPU = _Means(_own_linear, 1 << 19), _Means(_torch_linear, 1 << 26)


def _between(dtype):
    """What stands between products: bfloat16 is rounded, as PyTorch's own layers do; float16 would lack the range where only what stands
    between is large."""
    return dtype if dtype in (torch.bfloat16, torch.float64) else torch.float32


def _parts(n, width, means):
    """Equal slices of a long side, of about means.chunk numbers where a row has `width`."""
    step = max(1, -(-n // max(1, min(n // 256, -(-n * width // means.chunk)))))
    return [slice(i, min(i + step, n)) for i in range(0, n, step)]


KEPT = 1 << 20  # numbers of one projection that forward keeps for backward at the most


def _kept(target, N, width):
    """Rows of q, of k and v, and of what was attended that forward keeps: all where they are few, on a CPU (that does not interpret
    Triton, whose kernels make no k and v); else of a short target what was attended, and the rest is computed again."""
    B, M = target.shape[:2]
    if target.device.type == "cpu" and not jit.INTERPRET and B * max(M, N) * width <= KEPT:
        return M, N, M
    return 0, 0, M if M <= N else 0


def _absorbed(target, source, k_weight, v_weight, heads):
    """Whether a read multiplies its queries by the keys' weights, and what it attended by the values', rather than the source by both: with
    one head, where that is fewer multiplications. q . (W_k x) = (W_k^T q) . x and sum_n p_n W_v x_n = W_v sum_n p_n x_n."""
    M, N, (A, C), V = target.shape[1], source.shape[1], k_weight.shape, v_weight.shape[0]
    return (target.device.type == "cpu" and not jit.INTERPRET and heads == 1 and M <= N
            and M * C * (A + V + 2 * N) < N * (A + V) * (C + M))


def _outputs(*args):
    *tensors, key_lengths, heads, _, residual = args
    sizes = _check("cross_attend", tensors, key_lengths, heads, residual)
    target = tensors[0]
    between, sums = _between(target.dtype), torch.float64 if target.dtype is torch.float64 else torch.float32
    B, A, V = (sizes[axis] for axis in "BAV")
    absorbed = _absorbed(target, *(tensors[i] for i in (1, 3, 4)), heads)
    q, kv, a = (0, 0, sizes["M"]) if absorbed else _kept(target, sizes["N"], max(A, V))
    W = sizes["C"] if absorbed else V
    made = ((B, q, A), (B, kv, A), (B, kv, V), (B, a, W), (B, a, W if between is torch.bfloat16 else 0))
    return (target.new_empty((B, sizes["M"], sizes["O"])), *(target.new_empty(shape, dtype=between) for shape in made),
            *(target.new_empty((B, heads, a), dtype=sums) for _ in range(2)))


def _backward_outputs(dout, *args):
    *tensors, key_lengths, q, k, v, attended, attended_low, lse, lse_low, heads, _, residual = args
    op = "cross_attend_backward"
    _check(op, tensors, key_lengths, heads, residual)
    dims(op, target=(tensors[0], "B M D"), dout=(dout, "B M O"))
    dims(op, q=(q, "B I A"), k=(k, "B J A"), v=(v, "B J V"), attended=(attended, "B K W"), attended_low=(attended_low, "B K L"))
    dims(op, lse=(lse, "B H K"), lse_low=(lse_low, "B H K"))
    return tuple(dout.new_empty(0) if x is None else x.new_empty(x.shape) for x in tensors)


# By parts of the long side, whose projections never stand in memory whole.

class _Layer:
    """The layer's parameters, the pieces of its forward pass and of its gradient, and the gradients summed so far, in float32."""

    def __init__(self, tensors, heads, eps, means):
        self.dtype = _between(tensors[0].dtype)
        cast = [None if x is None else x.to(self.dtype) for x in tensors[2:]]
        self.q, self.k, self.v, self.out = zip(cast[:4], cast[4:8], strict=True)
        self.norms, self.heads, self.eps, self.linear = (cast[8:10], cast[10:12]), heads, eps, means.linear
        self.absorbed = _absorbed(tensors[0], tensors[1], tensors[3], tensors[4], heads)
        self.width = tensors[1].shape[2] if self.absorbed else max(tensors[2].shape[0], tensors[4].shape[0])
        self.scale = max(1, tensors[2].shape[0] // heads) ** -0.5
        self.grads = {}

    def normed(self, x, which):
        x, (gain, shift) = x.to(self.dtype), self.norms[which]
        return x if gain is None else F.layer_norm(x, x.shape[-1:], gain, shift, self.eps)

    def project(self, x, pair, added=None, out=None, dtype=None):
        """x W^T + b + added; into `out` if it is given."""
        if out is None:
            out = x.new_empty((*x.shape[:2], pair[0].shape[0]), dtype=dtype or self.dtype)
        return self.linear(x.to(self.dtype).flatten(0, 1), *pair, None if added is None else added.flatten(0, 1), out)

    def split(self, x):
        return x.unflatten(-1, (self.heads, x.shape[-1] // self.heads)).transpose(1, 2)

    def queries(self, q):
        return self.project(q, (self.k[0].T, None)) if self.absorbed else q

    def keys_and_values(self, x, into_k=None, into_v=None):
        return (x, x) if self.absorbed else (self.project(x, self.k, out=into_k), self.project(x, self.v, out=into_v))

    def values(self, a, key_lengths):
        """Of what was attended: zero without the bias for a query that saw no key."""
        if not self.absorbed:
            return a
        a, bias = self.project(a, (self.v[0], None)), self.v[1]
        return a if bias is None else a + bias * _seeing(key_lengths, a)

    def attend(self, q, k, v, key_lengths, out=None):
        """(attended (B, M, V), what its rounding left over, log-sum-exp in two floats), into four tensors if they are given. Not through
        attention's contract: v may have a width of its own."""
        if out is None:
            (B, M), V = q.shape[:2], v.shape[2]
            out = (q.new_empty((B, M, V)), q.new_empty((B, M, V if self.dtype is torch.bfloat16 else 0)),
                   *(q.new_empty((B, self.heads, M), dtype=torch.float32) for _ in range(2)))
        into("attention", (*map(self.split, out[:2]), *out[2:]), *map(self.split, (q, k, v)), None, key_lengths, False, self.scale)
        return out

    def add(self, name, value):
        self.grads[name] = self.grads[name].add_(value) if name in self.grads else value.float()

    def project_backward(self, dy, x, pair, name, added=None, dtype=torch.float32):
        """Gradient by x of a projection, + added; the parameters' are added to what there is."""
        flat, weight = dy.to(self.dtype).flatten(0, 1), f"{name}_weight"
        before = self.grads.get(weight)
        out = pair[0].new_empty(pair[0].shape, dtype=torch.float32) if before is None else before
        self.grads[weight] = self.linear(flat.T, x.to(self.dtype).flatten(0, 1).T, None, before, out)
        if pair[1] is not None and name in ("q", "out"):
            self.add(f"{name}_bias", flat.sum(0, dtype=torch.float32))
        return self.project(dy, (pair[0].T, None), added, dtype=dtype)

    def norm_backward(self, dy, x, which, added, out):
        """Gradient by x of a norm, + added, into `out`."""
        gain, shift = self.norms[which]
        if gain is None:
            return out.copy_(dy if added is None else dy + added)
        x, dy, added = (t if t is None else t.to(self.dtype) for t in (x, dy, added))
        made = out if out.is_contiguous() and out.dtype == self.dtype else torch.empty_like(x, memory_format=torch.contiguous_format)
        nothing, (dgain, dshift) = x.new_empty(0), (torch.empty_like(t, dtype=torch.float32) for t in (gain, shift))
        into("layer_norm_modulate_backward", (made, *[nothing] * 4, dgain, dshift), dy, added, x, None, None, None, None, gain.float(),
             shift.float(), self.eps, [True, *[False] * 4, True, True])
        name = ("target_norm", "source_norm")[which]
        self.add(f"{name}_0", dgain)
        self.add(f"{name}_1", dshift)
        return out if made is out else out.copy_(made)

    def bias_backward(self, da, key_lengths):
        """Of v: a query's weights sum to 1, if it sees a key. (k's is 0: it moves all scores of a query alike.)"""
        if self.v[1] is not None:
            self.add("v_bias", (da * _seeing(key_lengths, da)).flatten(0, 1).sum(0, dtype=torch.float32))

    def attend_backward(self, da, q, k, v, key_lengths, kept, partial):
        """(dq, dk, dv); `kept` is what `attend` gives."""
        grads = [x.new_empty(x.shape) for x in (q, k, v)]
        da, q, k, v, out, low, *dqkv = map(self.split, (da, q, k, v, *kept[:2], *grads))
        into("attention_backward", (*dqkv, q.new_empty(0)), da, None, q, k, v, None, key_lengths, out, low, *kept[2:], False,
             self.scale, False, partial)
        return grads


def _seeing(key_lengths, like):
    """1 for samples whose queries see a key, 0 for the others."""
    return 1.0 if key_lengths is None else (key_lengths > 0).to(like.dtype).view(-1, 1, 1)


def _two(x, dtype, scale=1.0):
    """x rounded to dtype, and scale times what that leaves over."""
    high = x.to(dtype)
    return high, torch.where(high.isfinite(), (x - high) * scale, 0.0).to(dtype)


def _keep_attended(kept, a):
    """a (B, M, V), in float32, into attended and attended_low."""
    for keep, value in zip(kept, _two(a, kept[0].dtype, LOW.value), strict=True):
        keep.copy_(value[..., :keep.shape[2]])


def _lengths(key_lengths, part):
    return None if key_lengths is None else (key_lengths - part.start).clamp(0, part.stop - part.start)


def _run(args, outs, means=_CPU):
    *tensors, key_lengths, heads, eps, residual = args
    out, *kept = outs
    target, source, layer = tensors[0], tensors[1], _Layer(tensors, heads, eps, means)
    B, M, N, width = *target.shape[:2], source.shape[1], layer.width
    if not B * M:
        return
    whole = kept[0].shape[1] == M and kept[1].shape[1] == N

    def finish(part, a):
        layer.project(layer.values(a, key_lengths), layer.out, target[:, part] if residual else None, out[:, part])

    if whole or M > N:
        into_q, into_k, into_v, *into_a = kept if whole else (None,) * 3
        x = layer.normed(source, 1)
        k, v = layer.keys_and_values(x, into_k, into_v)
        for part in [slice(0, M)] if whole else _parts(M, B * width, means):
            q = layer.project(layer.normed(target[:, part], 0), layer.q, out=into_q)
            finish(part, layer.attend(q, k, v, key_lengths, into_a or None)[0])
        return
    q = layer.queries(layer.project(layer.normed(target, 0), layer.q))
    a, top = torch.zeros_like(kept[3], dtype=torch.float32), q.new_full((B, heads, M), -torch.inf, dtype=torch.float64)
    for part in _parts(N, B * width, means):
        x = layer.normed(source[:, part], 1)
        a_part, low_part, *top_part = layer.attend(q, *layer.keys_and_values(x), _lengths(key_lengths, part))
        a_part = a_part.float() + low_part.float() / LOW.value if low_part.numel() else a_part
        top_part = top_part[0].double() + top_part[1]
        both = torch.logaddexp(top, top_part)
        weights = ((t - both.masked_fill(both == -torch.inf, 0.0)).exp().float().transpose(1, 2).unsqueeze(-1) for t in (top, top_part))
        a = sum(w * x.unflatten(-1, (heads, -1)) for w, x in zip(weights, (a, a_part), strict=True)).flatten(2)
        top = both
    _keep_attended(kept[3:5], a)
    for keep, value in zip(kept[5:], _two(top, torch.float32), strict=True):
        keep.copy_(value)
    finish(slice(0, M), a)


def _run_backward(args, outs, means=_CPU):
    dout, *tensors, key_lengths, q, k, v, attended, attended_low, lse, lse_low, heads, eps, residual = args
    kept = attended, attended_low, lse, lse_low
    target, source, layer = tensors[0], tensors[1], _Layer(tensors, heads, eps, means)
    B, M, N, width = *target.shape[:2], source.shape[1], layer.width
    dtarget, dsource = outs[:2]
    if not B * M * N:
        dsource.zero_()
    if not B * M:
        for grad in outs[2:]:
            grad.zero_()
        return

    def finish_target(part, dq, z):
        d = layer.project_backward(dq, z, layer.q, "q")
        layer.norm_backward(d, target[:, part], 0, dout[:, part] if residual else None, dtarget[:, part])

    def finish_source(part, dk, dv, x):
        if layer.absorbed:
            d = dk.float() + dv
        else:
            d = layer.project_backward(dk, x, layer.k, "k", layer.project_backward(dv, x, layer.v, "v"))
        layer.norm_backward(d, source[:, part], 1, None, dsource[:, part])

    whole = q.shape[1] == M and k.shape[1] == N
    if whole or M <= N:
        z = layer.normed(target, 0)
        q, dq = q if whole else layer.project(z, layer.q), None
        da = layer.project_backward(dout, layer.values(attended, key_lengths), layer.out, "out", dtype=layer.dtype)
        layer.bias_backward(da if N else 0 * da, key_lengths)
        if layer.absorbed:
            da = layer.project_backward(da, attended, layer.v, "v", dtype=layer.dtype)
        queries = layer.queries(q)
        parts = [slice(0, N)] if whole else _parts(N, B * width, means)

        def backward(part):  # a function, so that nothing of a part outlives it
            x = layer.normed(source[:, part], 1)
            keys, values = (k, v) if whole else layer.keys_and_values(x)
            dq, *dkv = layer.attend_backward(da, queries, keys, values, _lengths(key_lengths, part), kept, len(parts) > 1)
            finish_source(part, *dkv, x)
            return dq

        for part in parts:
            dq = backward(part) if dq is None else dq.float().add_(backward(part))
        if layer.absorbed:
            dq = layer.project_backward(dq, q, (layer.k[0].T, None), "k")
            layer.grads["k_weight"] = layer.grads["k_weight"].T
        finish_target(slice(0, M), dq, z)
    else:
        x = layer.normed(source, 1)
        k, v = layer.keys_and_values(x)
        dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (k, v))

        def backward(part):
            z = layer.normed(target[:, part], 0)
            q = layer.project(z, layer.q)
            kept = layer.attend(q, k, v, key_lengths)
            da = layer.project_backward(dout[:, part], kept[0], layer.out, "out", dtype=layer.dtype)
            layer.bias_backward(da if N else 0 * da, key_lengths)
            dq, dk_part, dv_part = layer.attend_backward(da, q, k, v, key_lengths, kept, False)
            del kept, da
            dk.add_(dk_part)
            dv.add_(dv_part)
            finish_target(part, dq, z)

        for part in _parts(M, B * width, means):
            backward(part)
        if N:
            finish_source(slice(0, N), dk, dv, x)
    for name, grad in zip(_TENSORS[2:], outs[2:], strict=True):
        if name in layer.grads:
            grad.copy_(layer.grads[name])
        else:
            grad.zero_()


def _refuse(x, *_):
    return "computes in float32, the tensors are float64" if x.dtype == torch.float64 else None


def _plan(target, source, q_weight, k_weight, v_weight, *rest):
    B, M, N, width = *target.shape[:2], source.shape[1], max(q_weight.shape[0], v_weight.shape[0])
    kind, side, n = ("read", "source", N) if M <= N else ("write", "target", M)
    if _absorbed(target, source, k_weight, v_weight, rest[10]):
        return f"read: the weights of keys and values absorbed into {M} queries and results; the source's {N} rows in " \
               f"{len(_parts(N, B * source.shape[2], _CPU))} parts"
    if _kept(target, N, width)[0] == M:
        return f"{kind}: at once; its projections are kept for backward"
    parts = len(_parts(n, B * width, _CPU))
    return f"{kind}: the {side}'s {n} rows in {parts} parts, each one's projections in cache and then forgotten"


def _cpu(run, plan=None):
    why = native.WHY_NOT["cpu"]
    return backend.Backend("cpu", ("cpu",), run, None, _refuse, why and f"native library: {why}", plan)


# In one kernel, on a GPU, where it fits the chip; else, and in the backward pass, by parts.

def _why_parts(tensors, heads):
    (M, _), N = tensors[0].shape[1:], tensors[1].shape[1]
    A, V, O = (tensors[i].shape[0] for i in (2, 4, 5))
    return triton.refuse("read" if M <= N else "write", tensors[0], A // heads, V // heads, O)


def _run_triton(args, outs):
    *tensors, key_lengths, heads, eps, residual = args
    out, *_, attended, attended_low, lse, lse_low = outs
    target, source = tensors[:2]
    if _why_parts(tensors, heads):
        _run(args, outs, _GPU)
    elif out.numel():
        layer = _Layer(tensors, heads, eps, _GPU)
        if target.shape[1] <= source.shape[1]:
            q = layer.project(layer.normed(target, 0), layer.q)
            a = torch.empty_like(attended, dtype=torch.float32)
            triton.read(q, source, layer.k, layer.v, layer.norms[1], key_lengths, heads, eps, a, lse, lse_low)
            _keep_attended((attended, attended_low), a)
            layer.project(a, layer.out, target if residual else None, out)
        else:
            x = layer.normed(source, 1)
            triton.write(target, layer.project(x, layer.k), layer.project(x, layer.v), layer.q, *layer.out, layer.norms[0], key_lengths,
                         heads, eps, residual, out)


def _plan_triton(target, source, *args):
    tensors, heads = (target, source, *args[:12]), args[13]
    why = _why_parts(tensors, heads)
    if why:
        return f"by parts on torch's products and attention: {why}"
    return "one kernel from source to attended targets" if target.shape[1] <= source.shape[1] else "one kernel from norm to residual"


def _reference(*args):
    """The meaning; it keeps nothing for backward."""
    return reference.cross_attend(*args), *(torch.zeros_like(x) for x in _outputs(*args)[1:])


CROSS = contract(f"cross_attend({_SCHEMA}, int heads, float eps, bool residual) -> ({', '.join(['Tensor'] * 8)})", outputs=_outputs,
                 values=lambda *args: lengths_within("cross_attend", args[14], args[1].shape[1]),
                 reference=_reference, module=__name__,
                 backends=(backend.triton(_run_triton, plan=_plan_triton), _cpu(_run, _plan)))
BACKWARD = contract(
    f"cross_attend_backward(Tensor dout, {_SCHEMA}, Tensor q, Tensor k, Tensor v, Tensor attended, Tensor attended_low, Tensor lse, "
    f"Tensor lse_low, int heads, float eps, bool residual) -> "
    f"({', '.join(['Tensor'] * len(_TENSORS))})", outputs=_backward_outputs, reference=reference.cross_attend_backward,
    backends=(backend.triton(lambda args, outs: _run_backward(args, outs, _GPU)), _cpu(_run_backward)), module=__name__)


def _save(ctx, args, outs):
    ctx.mark_non_differentiable(*outs[1:])
    return *args[:15], *outs[1:]


def _backward(ctx, dout, *_):
    if dout is None:
        return (None,) * 18
    grads = BACKWARD(dout, *ctx.saved_tensors, *ctx.args[15:])
    return *(g if w else None for g, w in zip(grads, ctx.wants[:14], strict=True)), *(None,) * 4


CROSS.autograd(save=_save, backward=_backward)


def _one_by_one(made):
    """Batching rule: the mapped calls one after the other, since weights' gradients are of one call each."""

    def rule(info, in_dims, *args):
        calls = [made(*(x if d is None else x.select(d, i) for x, d in zip(args, in_dims, strict=True))) for i in range(info.batch_size)]
        return tuple(map(torch.stack, zip(*calls, strict=True))), (0,) * len(calls[0])

    return rule


CROSS.vmap(_one_by_one(CROSS))
BACKWARD.vmap(_one_by_one(BACKWARD))


def cross_attend(target, source, q_weight, k_weight, v_weight, out_weight, *, heads, q_bias=None, k_bias=None, v_bias=None, out_bias=None,
                 target_norm=None, source_norm=None, eps=1e-6, residual=True, key_lengths=None):
    """target + W_o attention(W_q LN(target), W_k LN(source), W_v LN(source)), without the residual if it is False.

    Shapes   target (B, M, D), source (B, N, C); weights as in nn.Linear: q (A, D), k (A, C), v (V, C), out (O, V), heads divides A and
             V -> (B, M, O), O = D with the residual; key_lengths (B,) int64 in [0, N] hides source rows from there on
    Options  *_norm = (weight, bias) of a LayerNorm, or None. A read has M <= N (Perceiver, RIN: latents from tokens), a write M > N
    Dtypes   float32, float16, bfloat16, float64; all equal; computed in float32 (float64 in the reference); on a GPU bfloat16 is rounded
             between products, as in PyTorch's layers
    Grads    target, source, weights, biases, norms; first order by parts, computed again; higher orders and forward mode by the reference
    Raises   ValueError naming the argument, what was wanted and what was given; TypeError for a non-tensor
    Source   Jabri et al. 2022, section 3.1; Jaegle et al. 2021, section 3.1
    """
    op = "cross_attend"
    needed = dict(target=target, source=source, q_weight=q_weight, k_weight=k_weight, v_weight=v_weight, out_weight=out_weight)
    for name, x in needed.items():
        tensor(op, name, x)
    (heads,) = integers(op, "heads", heads)
    eps, residual = number(op, "eps", eps, least=0), flag(op, "residual", residual)
    norms = (*pair(op, "target_norm", target_norm), *pair(op, "source_norm", source_norm))
    with without_autocast(target):
        return CROSS(*needed.values(), q_bias, k_bias, v_bias, out_bias, *norms, key_lengths, heads, eps, residual)[0]
