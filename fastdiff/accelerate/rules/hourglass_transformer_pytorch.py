"""hourglass-transformer-pytorch: its attention, of whole sequences and between a token and those it stands for."""

import torch
import torch.nn.functional as F

from ...ops import attention
from .rule import Rule, hidden, own_dropout_note, watched


def _of_one_key(m, x, source):
    """What every query, row of x (B, M, D), gets from a sole key, source (B, 1, D): its value, hidden or not."""
    y = m.to_out(F.linear(source, m.to_kv.weight.chunk(2)[1])).expand(-1, x.shape[1], -1)
    if torch.is_grad_enabled():  # the derivatives of x and of the queries' weight are 0, and there
        y = y + (0 * x).sum() + (0 * m.to_q.weight).sum()
    return y


def _attention(plain):
    def forward(self, x, context=None, mask=None):
        if x.device.type not in ("cpu", "cuda") or (self.training and self.dropout.p > 0):
            return plain(self, x, context, mask)
        source = x if context is None else context
        M, N = x.shape[1], source.shape[1]
        if N == 1 and not watched(self.to_q, self.to_kv):
            return _of_one_key(self, x, source)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (self.to_q(x), *self.to_kv(source).chunk(2, -1)))
        seen, bias = None if mask is None else mask[:, None, None], None
        causal = self.causal and seen is None and M <= N  # with more queries than keys the first see none, and weigh all alike
        if self.causal and not causal:
            order = torch.ones(1, 1, M, N, dtype=torch.bool, device=x.device).tril(N - M)
            seen = order if seen is None else seen & order
        if seen is not None:
            q, bias = hidden(q, seen)
        return self.to_out(attention(q, k, v, bias=bias, causal=causal, scale=self.scale).transpose(1, 2).flatten(2))

    return forward


RULES = (
    Rule("hourglass_transformer_pytorch.hourglass_transformer_pytorch", "Attention", _attention, note=own_dropout_note,
         inputs=frozenset(("x", "context", "mask")), options=frozenset("dim heads dim_head dropout causal".split())),
)
