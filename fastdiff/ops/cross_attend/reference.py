"""LayerNorms, projections, attention and residual of a cross-attention layer, one after the other; and its gradient."""

import torch
import torch.nn.functional as F


def _forward(target, source, weights, biases, norms, key_lengths, heads, eps):
    """(normalised target and source, q, k, v, probabilities, attended)."""
    normed = [x if norm[0] is None else F.layer_norm(x, x.shape[-1:], *norm, eps) for x, norm in zip((target, source), norms, strict=True)]
    split = lambda x: x.unflatten(-1, (heads, -1)).transpose(1, 2)
    q, k, v = (split(F.linear(normed[i], w, b)) for i, w, b in zip((0, 1, 1), weights, biases, strict=True))
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if key_lengths is not None:
        scores = scores.masked_fill(torch.arange(k.shape[2], device=k.device) >= key_lengths.view(-1, 1, 1, 1), -torch.inf)
    none = (scores == -torch.inf).all(-1, keepdim=True)
    p = torch.softmax(scores.masked_fill(none, 0.0), -1).masked_fill(none, 0.0)
    return *normed, q, k, v, p, (p @ v).transpose(1, 2).flatten(2)


def cross_attend(target, source, q_weight, k_weight, v_weight, out_weight, q_bias, k_bias, v_bias, out_bias, target_norm_0, target_norm_1,
                 source_norm_0, source_norm_1, key_lengths, heads, eps, residual):
    """The result."""
    norms = ((target_norm_0, target_norm_1), (source_norm_0, source_norm_1))
    *_, attended = _forward(target, source, (q_weight, k_weight, v_weight), (q_bias, k_bias, v_bias), norms, key_lengths, heads, eps)
    out = F.linear(attended, out_weight, out_bias)
    return target + out if residual else out


def _norm_backward(dy, x, gain, eps):
    """(dx, dgain, dshift)."""
    if gain is None:
        return dy, None, None
    hat = F.layer_norm(x, x.shape[-1:], eps=eps)
    scale = torch.rsqrt((x - x.mean(-1, keepdim=True)).square().mean(-1, keepdim=True) + eps)
    d = dy * gain
    dx = scale * (d - d.mean(-1, keepdim=True) - hat * (d * hat).mean(-1, keepdim=True))
    return dx, (dy * hat).flatten(0, -2).sum(0), dy.flatten(0, -2).sum(0)


def _linear_backward(dy, x, weight, bias):
    """(dx, dweight, dbias)."""
    flat = dy.flatten(0, -2)
    return dy @ weight, flat.T @ x.flatten(0, -2), None if bias is None else flat.sum(0)


def cross_attend_backward(dout, target, source, q_weight, k_weight, v_weight, out_weight, q_bias, k_bias, v_bias, out_bias, target_norm_0,
                          target_norm_1, source_norm_0, source_norm_1, key_lengths, q_kept, k_kept, v_kept, attended, attended_low, lse,
                          lse_low, heads, eps, residual):
    """Gradients of the fourteen arguments before key_lengths; empty for those that are None. In float32 for half precision, whose range
    the products of this order of operations may leave."""
    dtype, tensors = target.dtype, (dout, target, source, q_weight, k_weight, v_weight, out_weight, q_bias, k_bias, v_bias, out_bias,
                                    target_norm_0, target_norm_1, source_norm_0, source_norm_1)
    dout, target, source, q_weight, k_weight, v_weight, out_weight, q_bias, k_bias, v_bias, out_bias, *norms = (
        x if x is None or dtype == torch.float64 else x.float() for x in tensors)
    weights, biases, norms = (q_weight, k_weight, v_weight), (q_bias, k_bias, v_bias), (norms[:2], norms[2:])
    z, x, q, k, v, p, a = _forward(target, source, weights, biases, norms, key_lengths, heads, eps)
    join = lambda t: t.transpose(1, 2).flatten(2)
    da, dwo, dbo = _linear_backward(dout, a, out_weight, out_bias)
    da = da.unflatten(-1, (heads, -1)).transpose(1, 2)
    dp = da @ v.transpose(-1, -2)
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
    dz, dwq, dbq = _linear_backward(join(ds @ k), z, q_weight, q_bias)
    dxk, dwk, dbk = _linear_backward(join(ds.transpose(-1, -2) @ q), x, k_weight, k_bias)
    dxv, dwv, dbv = _linear_backward(join(p.transpose(-1, -2) @ da), x, v_weight, v_bias)
    dtarget, dgain, dshift = _norm_backward(dz, target, norms[0][0], eps)
    dsource, dgain_s, dshift_s = _norm_backward(dxk + dxv, source, norms[1][0], eps)
    grads = (dtarget + dout if residual else dtarget, dsource, dwq, dwk, dwv, dwo, dbq, dbk, dbv, dbo, dgain, dshift, dgain_s, dshift_s)
    return tuple(target.new_empty(0, dtype=dtype) if g is None else g.to(dtype) for g in grads)
