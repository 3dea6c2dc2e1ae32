"""perceiver-ar-pytorch: attention of the last positions to all before them, and among themselves."""

import torch

from ...ops import attention
from .rule import Rule, dropout_note

_MODULE = "perceiver_ar_pytorch.perceiver_ar_pytorch"


def _turned(x, angles):
    """x (B, S, H, E) with its first channels, as many as angles (N, R) has, turned in pairs i, i + R / 2; the last S of the angles."""
    angles, half = angles[-x.shape[1]:].unsqueeze(1), angles.shape[1] // 2
    (c, d), (s, t) = angles.cos().chunk(2, -1), angles.sin().chunk(2, -1)
    a, b, rest = x.split((half, half, x.shape[-1] - 2 * half), -1)
    return torch.cat((a * c - b * s, b * d + a * t, rest), -1)


def _attend(self, q, k, v, angles, bias=None):
    """The layer's output for q, k, v (B, S, H, E), the last query at the last key."""
    if angles is not None:
        q, k = _turned(q, angles), _turned(k, angles)
    y = attention(*(t.transpose(1, 2) for t in (q, k, v)), bias=bias, causal=True, scale=self.scale)
    return self.to_out(y.transpose(1, 2).flatten(2))


def _original(self, x, angles, *dropouts):
    return (x.device.type not in ("cpu", "cuda") or (angles is not None and angles.dim() != 2)
            or (self.training and any(p > 0 for p in (self.dropout.p, *dropouts))))


def _causal(plain):
    def forward(self, x, rotary_pos_emb=None):
        if _original(self, x, rotary_pos_emb):
            return plain(self, x, rotary_pos_emb)
        q, k, v = self.to_qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        return _attend(self, q, k, v, rotary_pos_emb)

    return forward


def _prefix(plain):
    def forward(self, x, context, context_mask=None, rotary_pos_emb=None):
        mask = context_mask
        # A mask of the context alone leaves every query a key, itself.
        if (_original(self, x, rotary_pos_emb, self.cross_attn_dropout)
                or (mask is not None and (mask.dim() != 2 or mask.shape[1] > context.shape[1]))):
            return plain(self, x, context, mask, rotary_pos_emb)
        x = self.norm(x)
        source, bias = torch.cat((self.context_norm(context), x), 1), None
        q = self.to_q(x).unflatten(-1, (self.heads, -1))
        k, v = self.to_kv(source).unflatten(-1, (2, self.heads, -1)).unbind(2)
        if mask is not None:
            bias = q.new_zeros(len(mask), 1, 1, source.shape[1])
            bias[..., :mask.shape[1]].masked_fill_(~mask[:, None, None], -torch.inf)
        return _attend(self, q, k, v, rotary_pos_emb, bias)

    return forward


def _note(m):
    hidden = f"dropout of {m.cross_attn_dropout:g} of the prefix: the original runs in training mode" if m.cross_attn_dropout > 0 else None
    return dropout_note(m.dropout) or hidden


RULES = (
    Rule(_MODULE, "CausalAttention", _causal, note=lambda m: dropout_note(m.dropout), inputs=frozenset(("x", "rotary_pos_emb")),
         options=frozenset(("dim", "dim_head", "heads", "dropout"))),
    Rule(_MODULE, "CausalPrefixAttention", _prefix, note=_note, inputs=frozenset("x context context_mask rotary_pos_emb".split()),
         options=frozenset("dim dim_head heads max_heads_process dropout cross_attn_dropout".split())),
)
