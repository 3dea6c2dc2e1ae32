"""rin-pytorch: the attention inside RIN's layers."""

from ...ops import attention
from .rule import Rule, hidden, own_dropout_note


def _attend(plain):
    def forward(self, q, k, v, mask=None):
        if q.device.type not in ("cpu", "cuda") or (self.training and self.attn_dropout.p > 0):
            return plain(self, q, k, v, mask)
        bias = None
        if mask is not None:
            q, bias = hidden(q, mask if mask.dim() == 4 else mask[:, None, None])
        return attention(q, k, v, bias=bias)

    return forward


RULES = (
    Rule("rin_pytorch.attend", "Attend", _attend, note=own_dropout_note, inputs=frozenset("q k v mask".split()),
         options=frozenset(("dropout", "flash", "inverted_attention")),
         refuse=lambda m: "inverted attention: its softmax is over the queries" if getattr(m, "inverted_attention", False) else None),
    Rule("rin_pytorch.rin_pytorch", "LinearAttention", leave="linear attention: it has no softmax over scores of queries and keys"),
)
