"""Attention and its gradient as the textbook writes them."""

import torch


def scores(q, k, bias, key_lengths, causal, scale):
    """scale q k^T + bias, with -inf where a query may not see a key."""
    M, N = q.shape[2], k.shape[2]
    s = (q * (max(q.shape[3], 1) ** -0.5 if scale is None else scale)) @ k.transpose(-1, -2)
    if bias is not None:
        s = s + bias
    keys = torch.arange(N, device=q.device)
    if key_lengths is not None:
        s = s.masked_fill(keys >= key_lengths.view(-1, 1, 1, 1), -torch.inf)
    if causal:
        s = s.masked_fill(keys > torch.arange(M, device=q.device)[:, None] + (N - M), -torch.inf)
    return s


def softmax(s):
    """Over the last axis; a row of -inf (a query with no key) gives zeros, and no derivative passes through its 0 / 0."""
    none = (s == -torch.inf).all(-1, keepdim=True)
    return torch.softmax(s.masked_fill(none, 0.0), -1).masked_fill(none, 0.0)


def logsumexp(s):
    """Over the last axis, in float32 or wider; a row of -inf gives -inf."""
    s = s if s.dtype == torch.float64 else s.float()
    if s.shape[-1] == 0:
        return s.new_full(s.shape[:-1], -torch.inf)
    none = (s == -torch.inf).all(-1)
    return torch.logsumexp(s.masked_fill(none.unsqueeze(-1), 0.0), -1).masked_fill(none, -torch.inf)


def attention(q, k, v, bias=None, key_lengths=None, causal=False, scale=None):
    """(out, out_low, lse, lse_low): lse the log-sum-exp of the scores, *_low what rounding left over, out's times
    2^11 (a kernel may know it; here 0).

    A query with no key gives out = 0, lse = -inf.
    """
    s = scores(q, k, bias, key_lengths, causal, scale)
    lse = logsumexp(s)
    out = softmax(s) @ v
    return out, out.new_zeros((*out.shape[:3], out.shape[3] if out.dtype.itemsize == 2 else 0)), lse, torch.zeros_like(lse)


def attention_backward(dout, dlse, q, k, v, bias, key_lengths, out, out_low, lse, lse_low, causal, scale, bias_grad, partial):
    """Gradients (dq, dk, dv, dbias) of attention's (out, lse); dbias is empty unless wanted.

    partial: the keys are some of those that out and lse are of; dq is their part of it.
    """
    s = scores(q, k, bias, key_lengths, causal, scale)
    dp = dout @ v.transpose(-1, -2)
    # softmax gives p (dp - sum(p dp)); the derivative of lse is p itself.
    if partial:
        seen = (lse != -torch.inf).unsqueeze(-1)
        p = torch.exp((s - lse.unsqueeze(-1).masked_fill(~seen, 0.0)) - lse_low.unsqueeze(-1)).to(q.dtype) * seen
        row = -(dout * out).sum(-1, keepdim=True)
    else:
        p = softmax(s)
        row = -(dp * p).sum(-1, keepdim=True)
    if dlse is not None:
        row = row + dlse.to(p.dtype).unsqueeze(-1)
    ds = p * (dp + row)
    scale = max(q.shape[3], 1) ** -0.5 if scale is None else scale
    dbias = ds.sum_to_size(bias.shape) if bias_grad else q.new_empty(0)
    return (ds @ k) * scale, (ds.transpose(-1, -2) @ q) * scale, p.transpose(-1, -2) @ dout, dbias
