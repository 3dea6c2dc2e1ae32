"""What `accelerate` knows: one row per class of another package, recognised by name, so that the package is imported by its user alone."""

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

from ..ops import attention, fourier_cross_attend


@dataclass(frozen=True)
class Rule:
    """module, name: the class. forward(plain) -> its replacement, given the class's own forward for the calls it does not take.

    options and inputs: the constructor's and forward's parameters the replacement accounts for; a version with others is left alone.
    refuse(m): a sentence when module m is not for it, else None. note(m): a sentence about calls that stay with the original, else None.
    leave: a sentence, for a class that is known and left alone.
    """

    module: str
    name: str
    forward: Callable | None = None
    options: frozenset = frozenset()
    inputs: frozenset = frozenset()
    refuse: Callable = lambda m: None
    note: Callable = lambda m: None
    leave: str | None = None

    @property
    def kind(self):
        return f"{self.module}.{self.name}"

    def why_not(self, m):
        """None when module m, whose class this rule names, can be replaced; otherwise the reason."""
        if self.leave:
            return self.leave
        if "forward" in vars(m):
            return "its forward was replaced on the instance"
        for function, known in ((type(m).__init__, self.options), (type(m).forward, self.inputs)):
            unknown = set(inspect.signature(function).parameters) - known - {"self"}
            if unknown:
                return f"this version takes {', '.join(sorted(unknown))}, which the rule does not know"
        return self.refuse(m)


class Replaced:
    """Marks the classes that `accelerate` gives to modules; the class they had is the first base."""

    __slots__ = ()


def hidden(q, mask):
    """(q, bias) that give queries (B, H, M, E) the softmax of scores whose hidden places hold the dtype's lowest number.

    mask (B or 1, H or 1, M or 1, N), True where a key is seen. A query that sees no key then weighs all keys alike: its q becomes 0
    and its bias 0, so that all its scores are equal.
    """
    seen = mask.any(-1, keepdim=True)
    bias = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~(mask | ~seen), -torch.inf)
    return q * seen, bias


def _rin(plain):
    def forward(self, q, k, v, mask=None):
        if q.device.type not in ("cpu", "cuda") or (self.training and self.attn_dropout.p > 0):
            return plain(self, q, k, v, mask)
        bias = None
        if mask is not None:
            q, bias = hidden(q, mask if mask.dim() == 4 else mask[:, None, None])
        return attention(q, k, v, bias=bias)

    return forward


def _perceiver(plain):
    def forward(self, x, context=None, mask=None, **options):
        dropout = getattr(self, "dropout", None)
        if any(options.values()) or x.device.type not in ("cpu", "cuda") or (self.training and dropout is not None and dropout.p > 0):
            return plain(self, x, context, mask, **options)
        source = x if context is None else context
        if context is not None and getattr(self, "queries_contribute_kv", False):
            source = torch.cat((x, context), 1)
            if mask is not None:
                mask = torch.cat((mask.new_ones(x.shape[:2]), mask), -1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (self.to_q(x), *self.to_kv(source).chunk(2, -1)))
        bias = None
        if mask is not None:
            q, bias = hidden(q, mask.flatten(1)[:, None, None])
        return self.to_out(attention(q, k, v, bias=bias, scale=self.scale).transpose(1, 2).flatten(2))

    return forward


def _perceiver_model(plain):
    def forward(self, data, mask=None, return_embeddings=False, block_outputs=None, return_hiddens=False):
        reads = [block.cross_attn for block in self.layers]
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        hooked = any(getattr(m, h) for read in reads for m in read.modules() for h in hooks)
        if (mask is not None or block_outputs is not None or return_hiddens or hooked or data.dim() != self.input_axis + 2
                or data.device.type not in ("cpu", "cuda") or (self.training and any(r.fn.dropout.p > 0 for r in reads))):
            return plain(self, data, mask, return_embeddings, block_outputs, return_hiddens)
        x, image = self.latents.expand(data.shape[0], -1, -1), data.movedim(-1, 1)
        for block, read in zip(self.layers, reads, strict=True):
            k, v = read.fn.to_kv.weight.chunk(2)
            x = fourier_cross_attend(
                x, image, read.fn.to_q.weight, k, v, read.fn.to_out.weight, bands=self.num_freq_bands, max_freq=float(self.max_freq),
                order="axis", heads=read.fn.heads, out_bias=read.fn.to_out.bias, target_norm=(read.norm.weight, read.norm.bias),
                source_norm=(read.norm_context.weight, read.norm_context.bias), eps=read.norm.eps)
            x = block.cross_ff(x) + x
            for attend, feed in block.self_attns:
                x = attend(x) + x
                x = feed(x) + x
        return x if return_embeddings else self.to_logits(x)

    return forward


def _positions_that_factor(m):
    if not m.fourier_encode_data or m.input_axis not in (2, 3):
        return "its input is no grid of pixels with Fourier features of 2 or 3 axes"
    if m.has_attn_residual or any(m.inverted_cross_attn):
        return "attention residuals or inverted attention"
    return None


def _model_dropout(m):
    p = max(block.cross_attn.fn.dropout.p for block in m.layers)
    return f"dropout {p:g}: the original runs in training mode" if p > 0 else None


def _dropout(m):
    p = getattr(m, "attn_dropout", getattr(m, "dropout", None))
    return f"dropout {p.p:g}: the original runs in training mode" if p is not None and p.p > 0 else None


_LINEAR = "linear attention: it has no softmax over scores of queries and keys"
_PERCEIVER = {"forward": _perceiver, "note": _dropout, "inputs": frozenset(("x", "context", "mask", "inverted_attention")),
                  "options": frozenset(("query_dim", "context_dim", "heads", "dim_head", "dropout", "queries_contribute_kv"))}

RULES = (
    Rule("rin_pytorch.attend", "Attend", _rin, note=_dropout, inputs=frozenset("q k v mask".split()),
         options=frozenset(("dropout", "flash", "inverted_attention")),
         refuse=lambda m: "inverted attention: its softmax is over the queries" if getattr(m, "inverted_attention", False) else None),
    Rule("perceiver_pytorch.perceiver_pytorch", "Attention", **_PERCEIVER),
    Rule("perceiver_pytorch.perceiver_pytorch", "Perceiver", _perceiver_model, refuse=_positions_that_factor, note=_model_dropout,
         inputs=frozenset("data mask return_embeddings block_outputs return_hiddens".split()),
         options=frozenset("num_freq_bands depth max_freq input_channels input_axis num_latents latent_dim cross_heads latent_heads "
                           "cross_dim_head latent_dim_head num_classes attn_dropout ff_dropout weight_tie_layers fourier_encode_data "
                           "self_per_cross_attn final_classifier_head inverted_cross_attn attn_residual attn_residual_rank".split())),
    Rule("perceiver_pytorch.perceiver_io", "Attention", **_PERCEIVER),
    Rule("rin_pytorch.rin_pytorch", "LinearAttention", leave=_LINEAR),
    Rule("perceiver_pytorch.experimental", "LinearAttention", leave=_LINEAR),
    Rule("torch.nn.modules.activation", "MultiheadAttention", leave="calls scaled_dot_product_attention: run it in fastdiff.sdpa()"),
)
_BY_CLASS = {(rule.module, rule.name): rule for rule in RULES}


def rule_of(cls):
    """The rule whose row names `cls`, or None."""
    return _BY_CLASS.get((cls.__module__, cls.__qualname__))


def _alias(rule):
    return rule.kind.replace(".", "_")


@lru_cache(None)
def replacement(cls):
    """The class that modules of `cls` get: `cls` with the rule's forward. It is found again by name here, so that pickling works."""
    rule = rule_of(cls)
    return type(_alias(rule), (cls, Replaced), {"forward": rule.forward(cls.forward), "__module__": __name__, "__doc__": cls.__doc__})


def __getattr__(name):
    for rule in RULES:
        if rule.forward and _alias(rule) == name:
            return replacement(getattr(importlib.import_module(rule.module), rule.name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
