"""The union of two attentions, from their outputs and log-sum-exps."""

import torch


def merge_attention(out_a, lse_a, out_b, lse_b):
    top = torch.maximum(lse_a, lse_b)
    top = top.masked_fill(top == -torch.inf, 0.0)  # neither side has a key: both weights are 0
    a, b = torch.exp(lse_a - top), torch.exp(lse_b - top)
    total = a + b
    none = total == 0
    total = total.masked_fill(none, 1.0)
    weight = lambda x: (x / total).unsqueeze(-1).to(out_a.dtype)
    lse = (top + torch.log(total)).masked_fill(none, -torch.inf)
    return weight(a) * out_a + weight(b) * out_b, lse
