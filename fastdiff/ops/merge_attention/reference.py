"""The union of two attentions, from their outputs and log-sum-exps, and its gradient."""

import torch


def weights(lse_a, lse_b):
    """(w_a, w_b, lse): softmax and log-sum-exp of the pair; 0, 0 and -inf where neither side has a key."""
    top = torch.maximum(lse_a, lse_b)
    top = top.masked_fill(top == -torch.inf, 0.0)
    a, b = torch.exp(lse_a - top), torch.exp(lse_b - top)
    total = a + b
    none = total == 0
    total = total.masked_fill(none, 1.0)
    return a / total, b / total, (top + torch.log(total)).masked_fill(none, -torch.inf)


def merge_attention(out_a, lse_a, out_b, lse_b):
    a, b, lse = weights(lse_a, lse_b)
    return a.unsqueeze(-1).to(out_a.dtype) * out_a + b.unsqueeze(-1).to(out_a.dtype) * out_b, lse


def merge_attention_backward(dout, dlse, out_a, lse_a, out_b, lse_b):
    """Gradients of out_a, lse_a, out_b, lse_b. dlse_a = w_a (w_b g + dlse), dlse_b = w_b (dlse - w_a g), g = sum_e dout (out_a - out_b)."""
    a, b, _ = weights(lse_a, lse_b)
    g = (dout * (out_a - out_b)).sum(-1, dtype=lse_a.dtype)
    rest = torch.zeros_like(g) if dlse is None else dlse
    spread = lambda w: w.unsqueeze(-1).to(dout.dtype) * dout
    return spread(a), a * (b * g + rest), spread(b), b * (rest - a * g)
