"""PyTorch's own layers."""

import torch
import torch.nn.functional as F

from ...ops import attention
from .rule import Rule


def _heads(x, n):
    return x.unflatten(-1, (n, -1)).transpose(1, 2)


def _multihead(plain):
    def forward(self, query, key, value, key_padding_mask=None, need_weights=True, attn_mask=None, average_attn_weights=True,
                is_causal=False):
        tensors = (query, key, value)
        if (need_weights or (self.training and self.dropout > 0) or any(t.dim() != 3 or t.is_nested for t in tensors)
                or query.device.type not in ("cpu", "cuda") or (is_causal and attn_mask is None)):
            return plain(self, query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
        if not self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in tensors)
        weights = (self.in_proj_weight.chunk(3) if self.in_proj_weight is not None
                   else (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight))
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        if query is key and key is value and self.in_proj_weight is not None:
            q, k, v = F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        else:
            q, k, v = (F.linear(t, w, b) for t, w, b in zip((query, key, value), weights, biases, strict=True))
        q, k, v = (_heads(t, self.num_heads) for t in (q, k, v))
        causal = is_causal and key_padding_mask is None and q.shape[2] == k.shape[2]
        bias = None
        if attn_mask is not None and not causal:
            bias = _additive(attn_mask, q.dtype)
            bias = bias if bias.dim() == 2 else bias.unflatten(0, (-1, self.num_heads))
        if key_padding_mask is not None:
            hidden = _additive(key_padding_mask, q.dtype)[:, None, None]
            bias = hidden if bias is None else bias + hidden
        y = attention(q, k, v, bias=bias, causal=causal).transpose(1, 2).flatten(2)
        y = F.linear(y, self.out_proj.weight, self.out_proj.bias)
        return y if self.batch_first else y.transpose(0, 1), None

    return forward


def _additive(mask, dtype):
    """A mask that is True where a key is hidden, or is added, as one that is added."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -torch.inf) if mask.dtype is torch.bool else mask.to(dtype)


def _refuse(m):
    if m.bias_k is not None or m.add_zero_attn:
        return "it adds keys of its own (add_bias_kv or add_zero_attn)"
    return None


def _note(m):
    dropout = f"dropout {m.dropout:g}: the original runs in training mode; " if m.dropout > 0 else ""
    return f"{dropout}calls that ask for weights (need_weights=True, the default) are the original's"


RULES = (
    Rule("torch.nn.modules.activation", "MultiheadAttention", _multihead, refuse=_refuse, note=_note,
         inputs=frozenset("query key value key_padding_mask need_weights attn_mask average_attn_weights is_causal".split()),
         options=frozenset("embed_dim num_heads dropout bias add_bias_kv add_zero_attn kdim vdim batch_first device dtype".split())),
)
