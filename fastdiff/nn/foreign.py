"""Attention layers of other packages read into one description, from which the modules here are made."""

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Layer:
    """query, key, value, out: (weight, bias or None). target_norm, source_norm: (weight, bias, eps), None where that side has none.

    name: of the argument it was read from, in refusals.
    """

    name: str
    heads: int
    query: tuple
    key: tuple
    value: tuple
    out: tuple
    target_norm: tuple | None
    source_norm: tuple | None
    residual: bool

    def refuse(self, why):
        raise ValueError(f"{self.name} {why}")

    def eps(self):
        found = {norm[2] for norm in (self.target_norm, self.source_norm) if norm}
        if len(found) > 1:
            self.refuse(f"wants norms of one eps, got {sorted(found)}")
        return found.pop() if found else 1e-5

    def options(self):
        """What every module of attention layers takes."""
        return dict(heads=self.heads, bias=self.query[1] is not None, out_bias=self.out[1] is not None, residual=self.residual,
                    eps=self.eps())

    def qkv(self):
        weights, biases = zip(self.query, self.key, self.value, strict=True)
        return torch.cat(weights), None if biases[0] is None else torch.cat(biases)


def copied(module, **theirs):
    """module with the values of (weight, bias) copied into its submodules of these names, in their dtype and on their device.

    A norm's shift that is no parameter there is not trained here.
    """
    theirs = {name: pair for name, pair in theirs.items() if pair is not None}
    module.to(next(iter(theirs.values()))[0])
    with torch.no_grad():
        for name, (weight, bias, *_) in theirs.items():
            mine = getattr(module, name)
            mine.weight.copy_(weight)
            if bias is not None:
                mine.bias.copy_(bias)
                if isinstance(mine, nn.LayerNorm):
                    mine.bias.requires_grad_(isinstance(bias, nn.Parameter))
    return module


def of(name, m, *wanted):
    """m, whose class must be one of those named; name: of the argument, in the refusal."""
    kind = f"{type(m).__module__}.{type(m).__qualname__}"
    if kind not in wanted:
        raise ValueError(f"{name} wants a {' or '.join(wanted)}, got a {kind}")
    return m


def _linear(m):
    return m.weight, m.bias


def _norm(m):
    return (m.weight, m.bias, m.eps) if isinstance(m, nn.LayerNorm) else None


def no_dropout(name, m):
    """Dropout is what a module in eval mode does not do."""
    if m.training and m.p > 0:
        raise ValueError(f"{name} wants a layer without dropout, or in eval mode, got dropout {m.p:g} in training mode")


def rin_pytorch(name, m, residual):
    """A rin_pytorch Attention; its norms' shifts are buffers of zeros."""
    of(name, m, "rin_pytorch.rin_pytorch.Attention")
    extras = {"time conditioning": m.time_cond is not None, "qk_norm": m.qk_norm, "inverted attention": m.attend.inverted_attention}
    if found := [extra for extra, there in extras.items() if there]:
        raise ValueError(f"{name} wants plain attention, got a layer with {' and '.join(found)}")
    norm = lambda x: None if isinstance(x, nn.Identity) else (x.gamma, x.beta, 1e-5)
    key, value = m.to_kv.weight.chunk(2)
    return Layer(name, m.heads, _linear(m.to_q), (key, None), (value, None), _linear(m.to_out), norm(m.norm), norm(m.norm_context),
                 residual)


def perceiver_pytorch(name, m, residual):
    """A perceiver_pytorch PreNorm of an Attention, or the Attention alone."""
    packages = ("perceiver_pytorch.perceiver_pytorch", "perceiver_pytorch.perceiver_io")
    of(name, m, *(f"{package}.{kind}" for package in packages for kind in ("PreNorm", "Attention")))
    attention = getattr(m, "fn", m)
    of(name, attention, *(f"{package}.Attention" for package in packages))
    if getattr(attention, "queries_contribute_kv", False):
        raise ValueError(f"{name} wants keys of the source alone, got queries_contribute_kv=True")
    if hasattr(attention, "dropout"):
        no_dropout(name, attention.dropout)
    key, value = attention.to_kv.weight.chunk(2)
    return Layer(name, attention.heads, _linear(attention.to_q), (key, None), (value, None), _linear(attention.to_out),
                 _norm(getattr(m, "norm", None)), _norm(getattr(m, "norm_context", None)), residual)


_TRANSFORMERS = "transformers.models.perceiver.modeling_perceiver"


def transformers(name, m):
    """transformers' PerceiverAttention, or that of a PerceiverLayer."""
    of(name, m, f"{_TRANSFORMERS}.PerceiverLayer", f"{_TRANSFORMERS}.PerceiverAttention")
    attention = getattr(m, "attention", m)
    inner = attention.self
    no_dropout(name, inner.dropout)
    return Layer(name, inner.num_heads, _linear(inner.query), _linear(inner.key), _linear(inner.value), _linear(attention.output.dense),
                 _norm(inner.layernorm1), _norm(inner.layernorm2), attention.use_query_residual)


def why_no_grid(preprocessor):
    """None when a transformers Perceiver's preprocessor gives [pixels | Fourier features] of a 2- or 3-D grid, else the reason."""
    if f"{type(preprocessor).__module__}.{type(preprocessor).__qualname__}" != f"{_TRANSFORMERS}.PerceiverImagePreprocessor":
        return f"its input preprocessor is a {type(preprocessor).__name__}, not a PerceiverImagePreprocessor"
    for option, wanted in (("prep_type", "pixels"), ("position_encoding_type", "fourier"), ("concat_or_add_pos", "concat"),
                           ("spatial_downsample", 1), ("temporal_downsample", 1)):
        if (given := getattr(preprocessor, option)) != wanted:
            return f"its input preprocessor has {option}={given!r}, not {wanted!r}"
    positions = preprocessor.position_embeddings
    if preprocessor.project_pos_dim > 0 or positions.sine_only or not positions.concat_pos or positions.num_dimensions not in (2, 3):
        return "its positions are no sines, cosines and places of 2 or 3 axes as they are"
    return None
