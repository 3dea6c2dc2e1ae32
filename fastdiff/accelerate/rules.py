"""What `accelerate` knows: one row per class of another package, recognised by name, so that the package is imported by its user alone."""

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch

from ..nn import foreign
from ..ops import attention, fourier_cross_attend, patch_embed, patchify, unpatch_project, unpatchify

_TRANSFORMERS = "transformers.models.perceiver.modeling_perceiver"


@dataclass(frozen=True)
class Rule:
    """module, name: the class. forward(plain) -> its replacement, given the class's own forward for the calls it does not take.

    options and inputs: the constructor's and forward's parameters the replacement accounts for; a version with others is left alone.
    refuse(m): a sentence when module m is not for it, else None. note(m): a sentence about calls that stay with the original, else None.
    leave: a sentence, for a class that is known and left alone. about(m): whether the rule has a word on module m at all.
    """

    module: str
    name: str
    forward: Callable | None = None
    options: frozenset = frozenset()
    inputs: frozenset = frozenset()
    refuse: Callable = lambda m: None
    note: Callable = lambda m: None
    leave: str | None = None
    about: Callable = lambda m: True

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


def _watched(*modules):
    """Whether modules that a replacement does not call have hooks, or a forward of their own, that it would leave out."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any("forward" in m.__dict__ or any(getattr(m, h) for h in hooks) for m in modules)


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
        if (mask is not None or block_outputs is not None or return_hiddens
                or _watched(*self.layers, *(m for r in reads for m in r.modules())) or data.dim() != self.input_axis + 2
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


def _transformers(plain):
    def forward(self, hidden_states, attention_mask=None, inputs=None, inputs_mask=None, output_attentions=False):
        x, mask = self.layernorm1(hidden_states), attention_mask if inputs is None else inputs_mask
        q = self.query(x)
        # The lowest float16 is not so low that float32 sums of scores and it are all alike, as those of a query without keys are there.
        if (output_attentions or x.device.type not in ("cpu", "cuda") or (self.dropout.training and self.dropout.p > 0)
                or (mask is not None and (q.dtype is torch.float16 or not mask.is_floating_point()))):
            return plain(self, hidden_states, attention_mask, inputs, inputs_mask, output_attentions)
        source = self.layernorm2(inputs)
        source = x if source is None else source
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, self.key(source), self.value(source)))
        if mask is not None and mask.dtype != q.dtype:
            # Under autocast: the lowest float32, which hides a key, would be -inf.
            mask = mask.to(q.dtype).clamp(min=torch.finfo(q.dtype).min)
        return (attention(q, k, v, bias=mask).transpose(1, 2).flatten(2),)

    return forward


def _transformers_model(plain):
    package = importlib.import_module(_TRANSFORMERS)

    def forward(self, inputs, attention_mask=None, subsampled_output_points=None, output_attentions=None, output_hidden_states=None,
                interpolate_pos_encoding=False, return_dict=None, **rest):
        wanted = lambda option, name: getattr(self.config, name) if option is None else option
        read, positions = self.encoder.cross_attention, self.input_preprocessor.position_embeddings
        attend, out = read.attention.self, read.attention.output.dense
        if (attention_mask is not None or subsampled_output_points is not None or wanted(output_attentions, "output_attentions")
                or wanted(output_hidden_states, "output_hidden_states") or inputs.dim() != positions.num_dimensions + 2
                or inputs.device.type not in ("cpu", "cuda") or (attend.dropout.training and attend.dropout.p > 0)
                or _watched(self.encoder, read, *read.attention.modules(), *self.input_preprocessor.modules())):
            return plain(self, inputs, attention_mask, subsampled_output_points, output_attentions, output_hidden_states,
                         interpolate_pos_encoding, return_dict, **rest)
        x, image = self.embeddings(batch_size=inputs.shape[0]), inputs if inputs.dim() == 4 else inputs.transpose(1, 2)
        x = fourier_cross_attend(
            x, image, attend.query.weight, attend.key.weight, attend.value.weight, out.weight, bands=positions.num_bands,
            max_freq=tuple(map(float, positions.max_resolution)), heads=attend.num_heads, q_bias=attend.query.bias,
            k_bias=attend.key.bias, v_bias=attend.value.bias, out_bias=out.bias,
            target_norm=(attend.layernorm1.weight, attend.layernorm1.bias),
            source_norm=(attend.layernorm2.weight, attend.layernorm2.bias), eps=attend.layernorm1.eps,
            residual=read.attention.use_query_residual)
        x = package.apply_chunking_to_forward(read.feed_forward_chunk, read.chunk_size_feed_forward, read.seq_len_dim, x) + x
        for layer in [*self.encoder.self_attends] * self.encoder.config.num_blocks:
            x = layer(x)[0]
        logits = None
        if self.decoder:
            logits = self.decoder(self.decoder.decoder_query(inputs), z=x).logits  # of the inputs it takes their number alone
            if self.output_postprocessor:
                logits = self.output_postprocessor(logits, modality_sizes=None)
        result = package.PerceiverModelOutput(logits=logits, last_hidden_state=x)
        return result if wanted(return_dict, "return_dict") else result.to_tuple()

    return forward


def _no_patches(proj):
    """A reason against `patch_embed` in place of a projection, or None."""
    if type(proj) is not torch.nn.Conv2d:
        return f"its projection is a {type(proj).__name__}, not a Conv2d"
    if (proj.stride, proj.padding, proj.dilation, proj.groups) != (proj.kernel_size, (0, 0), (1, 1), 1):
        return f"its projection {proj} is not one of patches side by side"
    return None


def _embeddable(x, proj):
    return (x.dim() == 4 and x.device.type in ("cpu", "cuda") and x.shape[1] == proj.in_channels and not _no_patches(proj)
            and not any(n % p for n, p in zip(x.shape[2:], proj.kernel_size, strict=True)) and not _watched(proj))


def _embedded(x, proj, position=None):
    return patch_embed(x, proj.weight.flatten(1), proj.bias, position, patch=proj.kernel_size, order="cpq")


def _timm_patches(plain):
    def forward(self, x):
        if not _embeddable(x, self.proj) or (getattr(self, "strict_img_size", True) and self.img_size not in (None, tuple(x.shape[2:]))):
            return plain(self, x)
        return self.norm(_embedded(x, self.proj))

    return forward


def _diffusers_patches(plain):
    def forward(self, latent):
        grid = tuple(n // self.patch_size for n in latent.shape[-2:])
        largest = getattr(self, "pos_embed_max_size", None)
        whole = self.pos_embed is None or (not largest and grid == (self.height, self.width))
        if not _embeddable(latent, self.proj) or not (whole or largest):
            return plain(self, latent)
        position = self.pos_embed
        if not whole:
            position = self.cropped_pos_embed(*latent.shape[-2:])
        if position is not None:
            position = position[0].to(self.proj.weight.dtype)
        if not self.layer_norm:
            return _embedded(latent, self.proj, position)
        y = self.norm(_embedded(latent, self.proj))
        return y if position is None else (y + position).to(y.dtype)

    return forward


def _flat(m):
    return _no_patches(m.proj) if m.flatten else "it keeps the grid of patches"


def _axes(side):
    """Half a pattern of einops, "b (h p)", as (("b",), ("h", "p"))."""
    axes, inside = [], False
    for word in side.replace("(", " ( ").replace(")", " ) ").split():
        if word in "()":
            inside = word == "("
            axes += [()] if inside else []
        elif inside:
            axes[-1] += (word,)
        else:
            axes.append((word,))
    return axes


def _pattern(pattern, given):
    """(whether to tokens, order, names of the patch's axes, of the grid's) of a pattern between image and rows of patches, else None."""
    left, right = map(_axes, pattern.split("->"))
    for image, rows in ((left, right), (right, left)):
        if len(rows) == 3 and 3 <= len(image) <= 5 and [len(axis) for axis in image] == [1, 1] + [2] * (len(image) - 2):
            names = [name for axis in image for name in axis]
            batch, channel, grid, patch = image[0], image[1], *zip(*image[2:], strict=True)
            orders = {(*patch, *channel): "pqc", (*channel, *patch): "cpq"}
            if (rows[:2] == [batch, grid] and rows[2] in orders and all(map(str.isidentifier, names)) and len({*names}) == len(names)
                    and set(patch) <= set(given) <= {*patch, *grid}):
                return image is left, orders[rows[2]], patch, grid
    return None


_PATTERNS = {}


def _patches(m):
    """(whether to tokens, order, patch, names of the grid's axes) of an einops Rearrange between image and rows of patches, else None."""
    if type(m).__qualname__ != "Rearrange" or type(m).__module__ != "einops.layers.torch":
        return None
    key = m.pattern, tuple(m.axes_lengths)
    if key not in _PATTERNS:
        _PATTERNS[key] = _pattern(*key)
    found = _PATTERNS[key]
    return found and (*found[:2], tuple(m.axes_lengths[name] for name in found[2]), found[3])


def _grid(m, names, N):
    """The grid of N patches whose axes' lengths m knows but for one, or None."""
    known = [m.axes_lengths.get(name) for name in names]
    if known.count(None) == 1:
        rest = prod([n for n in known if n is not None])
        known = [N // max(rest, 1) if n is None else n for n in known]
    return None if None in known or prod(known) != N else tuple(known)


def _to_tokens(x, m, linear, order, patch, names):
    """Rearrange m, and the linear layer behind it if there is one; None where x is not for it."""
    grid = [n // p for n, p in zip(x.shape[2:], patch, strict=False)]
    if x.dim() != 2 + len(patch) or any(n % p for n, p in zip(x.shape[2:], patch, strict=True)):
        return None
    if any(m.axes_lengths.get(name, n) != n for name, n in zip(names, grid, strict=True)):
        return None
    if linear is None:
        return patchify(x, patch, order=order)
    if x.shape[1] * prod(patch) != linear.in_features:
        return None
    return patch_embed(x, linear.weight, linear.bias, patch=patch, order=order)


def _to_image(x, m, linear, order, patch, names):
    """Rearrange m, and the linear layer before it if there is one; None where x is not for it."""
    grid = None if x.dim() != 3 else _grid(m, names, x.shape[1])
    width = x.shape[-1] if linear is None else linear.out_features
    if grid is None or width % prod(patch) or (linear is not None and x.shape[-1] != linear.in_features):
        return None
    if linear is None:
        return unpatchify(x, patch, grid, order=order)
    return unpatch_project(x, linear.weight, linear.bias, patch=patch, grid=grid, order=order)


def _plain_linear(m):
    return m if type(m) is torch.nn.Linear and not _watched(m) else None


def _sequential(plain):
    def forward(self, input):
        x, steps = input, [*self]
        while steps:
            m, then = steps.pop(0), steps[0] if steps else None
            y, found = None, None if _watched(m) else _patches(m)
            if isinstance(x, torch.Tensor) and x.device.type in ("cpu", "cuda") and x.is_floating_point():
                if found and found[0]:
                    y = _to_tokens(x, m, _plain_linear(then), *found[1:])
                    steps = steps[1:] if y is not None and _plain_linear(then) else steps
                elif found:
                    y = _to_image(x, m, None, *found[1:])
                elif _plain_linear(m) and then is not None and not _watched(then) and (found := _patches(then)) and not found[0]:
                    y = _to_image(x, then, m, *found[1:])
                    steps = steps[1:] if y is not None else steps
            x = m(x) if y is None else y
        return x

    return forward


def _no_grid(m):
    """A reason against `_transformers_model`, or None."""
    if why := foreign.why_no_grid(m.input_preprocessor):
        return why
    attend = m.encoder.cross_attention.attention.self
    if attend.layernorm1.eps != attend.layernorm2.eps:
        return f"its read's norms have different eps, {attend.layernorm1.eps} and {attend.layernorm2.eps}"
    kind = f"{type(m.decoder).__module__}.{type(m.decoder).__qualname__}"
    if m.decoder is None:
        return None
    if kind not in (f"{_TRANSFORMERS}.PerceiverClassificationDecoder", f"{_TRANSFORMERS}.PerceiverBasicDecoder"):
        return f"its decoder is a {kind}, which may want the input's features"
    decoder = getattr(m.decoder, "decoder", m.decoder)
    if decoder.position_encoding_type != "trainable" or decoder.concat_preprocessed_input:
        return "its decoder's queries are made from the input"
    return None


def _one_width(m):
    if m.qk_channels != m.v_channels:
        return f"queries and keys of {m.qk_channels} channels, values of {m.v_channels}: attention takes one width"
    return None


def _positions_that_factor(m):
    if not m.fourier_encode_data or m.input_axis not in (2, 3):
        return "its input is no grid of pixels with Fourier features of 2 or 3 axes"
    if m.has_attn_residual or any(m.inverted_cross_attn):
        return "attention residuals or inverted attention"
    return None


def _note(*dropouts):
    p = max((d.p for d in dropouts), default=0)
    return f"dropout {p:g}: the original runs in training mode" if p > 0 else None


def _dropout(m):
    found = getattr(m, "attn_dropout", getattr(m, "dropout", None))
    return _note(*filter(None, [found]))


_LINEAR = "linear attention: it has no softmax over scores of queries and keys"
_PERCEIVER = {"forward": _perceiver, "note": _dropout, "inputs": frozenset(("x", "context", "mask", "inverted_attention")),
                  "options": frozenset(("query_dim", "context_dim", "heads", "dim_head", "dropout", "queries_contribute_kv"))}

RULES = (
    Rule("rin_pytorch.attend", "Attend", _rin, note=_dropout, inputs=frozenset("q k v mask".split()),
         options=frozenset(("dropout", "flash", "inverted_attention")),
         refuse=lambda m: "inverted attention: its softmax is over the queries" if getattr(m, "inverted_attention", False) else None),
    Rule("perceiver_pytorch.perceiver_pytorch", "Attention", **_PERCEIVER),
    Rule("perceiver_pytorch.perceiver_pytorch", "Perceiver", _perceiver_model, refuse=_positions_that_factor,
         note=lambda m: _note(*(block.cross_attn.fn.dropout for block in m.layers)),
         inputs=frozenset("data mask return_embeddings block_outputs return_hiddens".split()),
         options=frozenset("num_freq_bands depth max_freq input_channels input_axis num_latents latent_dim cross_heads latent_heads "
                           "cross_dim_head latent_dim_head num_classes attn_dropout ff_dropout weight_tie_layers fourier_encode_data "
                           "self_per_cross_attn final_classifier_head inverted_cross_attn attn_residual attn_residual_rank".split())),
    Rule("perceiver_pytorch.perceiver_io", "Attention", **_PERCEIVER),
    Rule(_TRANSFORMERS, "PerceiverSelfAttention", _transformers, refuse=_one_width, note=_dropout,
         inputs=frozenset("hidden_states attention_mask inputs inputs_mask output_attentions".split()),
         options=frozenset("config is_cross_attention qk_channels v_channels num_heads q_dim kv_dim".split())),
    Rule(_TRANSFORMERS, "PerceiverModel", _transformers_model, refuse=_no_grid,
         note=lambda m: _note(m.encoder.cross_attention.attention.self.dropout),
         inputs=frozenset("inputs attention_mask subsampled_output_points output_attentions output_hidden_states interpolate_pos_encoding "
                          "return_dict kwargs".split()),
         options=frozenset("config decoder input_preprocessor output_postprocessor".split())),
    Rule("timm.layers.patch_embed", "PatchEmbed", _timm_patches, refuse=_flat, inputs=frozenset("x"),
         options=frozenset("img_size patch_size in_chans embed_dim norm_layer flatten output_fmt bias strict_img_size dynamic_img_pad "
                           "device dtype".split())),
    Rule("diffusers.models.embeddings", "PatchEmbed", _diffusers_patches, refuse=_flat, inputs=frozenset(("latent",)),
         options=frozenset("height width patch_size in_channels embed_dim layer_norm flatten bias interpolation_scale pos_embed_type "
                           "pos_embed_max_size".split())),
    Rule("torch.nn.modules.container", "Sequential", _sequential, about=lambda m: any(map(_patches, m)), inputs=frozenset(("input",)),
         options=frozenset(("args",))),
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
