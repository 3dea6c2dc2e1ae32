"""diffusers: patch embeddings, residual blocks of U-Nets, attention, norms and feed-forward layers of transformers."""

import torch
import torch.nn.functional as F

from ...ops import attention, gate_residual, gate_residual_norm_modulate, geglu, group_norm_modulate, layer_norm_modulate
from .patches import embeddable, embedded, flat
from .rule import Rule, added, many_scores, pays, watched

_NORMALIZATION = "diffusers.models.normalization"
_PROCESSORS = "diffusers.models.attention_processor"
_KNOWN = ("AttnProcessor2_0", "AttnProcessor")


def _patch_embed(plain):
    def forward(self, latent):
        grid = tuple(n // self.patch_size for n in latent.shape[-2:])
        largest = getattr(self, "pos_embed_max_size", None)
        whole = self.pos_embed is None or (not largest and grid == (self.height, self.width))
        if not embeddable(latent, self.proj) or not (whole or largest):
            return plain(self, latent)
        position = self.pos_embed
        if not whole:
            position = self.cropped_pos_embed(*latent.shape[-2:])
        if position is not None:
            position = position[0].to(self.proj.weight.dtype)
        if not self.layer_norm:
            return embedded(latent, self.proj, position)
        y = self.norm(embedded(latent, self.proj))
        return y if position is None else (y + position).to(y.dtype)

    return forward


def _here(x):
    return x.device.type in ("cpu", "cuda") and x.is_floating_point()


def _modulated(norm, x, shift, scale):
    """norm(x) (1 + scale) + shift, x (B, N, D), shift and scale (B, D): by the op where it takes them and gives the same dtype."""
    # Under autocast torch's norm gives float32 of any x.
    same = x.dtype == torch.float32 or (shift.dtype == x.dtype and not torch.is_autocast_enabled(x.device.type))
    fits = x.dim() == 3 and shift.shape == (x.shape[0], x.shape[2]) and shift.dtype != torch.float64
    if not same or not fits or not _here(x) or not pays("layer norm", x) or watched(norm):
        return norm(x) * (1 + scale[:, None]) + shift[:, None]
    return layer_norm_modulate(x, shift.to(x.dtype), scale.to(x.dtype), norm.weight, norm.bias, eps=norm.eps)


def _norm_silu(norm, act, x, scale=None, shift=None):
    """silu(norm(x) (1 + scale) + shift), x (B, C, h, w), scale and shift (B, C) or None."""
    if not _here(x) or not pays("group norm" if scale is None else "modulated group norm", x) or watched(norm, act):
        y = norm(x)
        return act(y if scale is None else y * (1 + scale[..., None, None]) + shift[..., None, None])
    if scale is not None:
        scale, shift = scale.to(x.dtype), shift.to(x.dtype)
    return group_norm_modulate(x, norm.num_groups, norm.weight, norm.bias, scale, shift, eps=norm.eps, silu=True)


def _resnet(plain):
    def forward(self, input_tensor, temb, *args, **kwargs):
        if args or kwargs or input_tensor.dim() != 4 or (temb is None and self.time_embedding_norm == "scale_shift"):
            return plain(self, input_tensor, temb, *args, **kwargs)
        x, h = input_tensor, _norm_silu(self.norm1, self.nonlinearity, input_tensor)
        if self.upsample is not None:
            # torch's nearest upsampling fails on large channels-last batches.
            x, h = (self.upsample(y.contiguous() if len(h) >= 64 else y) for y in (x, h))
        elif self.downsample is not None:
            x, h = self.downsample(x), self.downsample(h)
        h, scale, shift = self.conv1(h), None, None
        if self.time_emb_proj is not None:
            temb = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
        if temb is not None and self.time_embedding_norm == "default":
            h = h + (temb if self.time_emb_proj is None else temb[..., None, None])
        elif temb is not None:
            scale, shift = temb.chunk(2, 1)
        h = self.conv2(self.dropout(_norm_silu(self.norm2, self.nonlinearity, h, scale, shift)))
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x.contiguous() if self.training else x)
        y = x + h
        return y if self.output_scale_factor == 1 else y / self.output_scale_factor

    return forward


def _no_resnet(m):
    if type(m.nonlinearity) is not torch.nn.SiLU:
        return f"its activation is {type(m.nonlinearity).__name__}, not SiLU"
    if type(m.norm1) is not torch.nn.GroupNorm or type(m.norm2) is not torch.nn.GroupNorm:
        return "its norms are no nn.GroupNorm"
    if m.time_embedding_norm not in ("default", "scale_shift") or (m.time_embedding_norm == "scale_shift" and m.time_emb_proj is None):
        return f"time_embedding_norm={m.time_embedding_norm!r} without a projection"
    return None


def _ada_norm(plain):
    def forward(self, x, timestep=None, temb=None):
        made = self.linear(self.silu(temb if self.emb is None else self.emb(timestep)))
        if self.chunk_dim == 1:
            shift, scale = made.chunk(2, 1)
        else:
            scale, shift = made.chunk(2, 0)
            if made.dim() == 1 and x.dim() == 3:
                scale, shift = scale.expand(len(x), -1), shift.expand(len(x), -1)
            else:
                return self.norm(x) * (1 + scale) + shift
        return _modulated(self.norm, x, shift, scale)

    return forward


def _ada_norm_zero(plain):
    def forward(self, x, timestep=None, class_labels=None, hidden_dtype=None, emb=None):
        if self.emb is not None:
            emb = self.emb(timestep, class_labels, hidden_dtype=hidden_dtype)
        shift, scale, *others = self.linear(self.silu(emb)).chunk(6, 1)
        return _modulated(self.norm, x, shift, scale), *others

    return forward


def _ada_norm_zero_single(plain):
    def forward(self, x, emb=None):
        shift, scale, gate = self.linear(self.silu(emb)).chunk(3, 1)
        return _modulated(self.norm, x, shift, scale), gate

    return forward


def _ada_norm_continuous(plain):
    def forward(self, x, conditioning_embedding):
        scale, shift = self.linear(self.silu(conditioning_embedding).to(x.dtype)).chunk(2, 1)
        return _modulated(self.norm, x, shift, scale)

    return forward


def _no_layer_norm(m):
    return None if type(m.norm) is torch.nn.LayerNorm else f"its norm is a {type(m.norm).__name__}, not an nn.LayerNorm"


def _geglu(plain):
    def forward(self, hidden_states, *args, **kwargs):
        if args or kwargs or not _here(hidden_states):
            return plain(self, hidden_states, *args, **kwargs)
        x = self.proj(hidden_states)
        if pays("geglu", x):
            return geglu(x)
        x, gate = x.chunk(2, -1)
        return x * F.gelu(gate)

    return forward


def _attention(plain):
    def forward(self, hidden_states, encoder_hidden_states=None, attention_mask=None, **cross_attention_kwargs):
        x, source, mask = hidden_states, encoder_hidden_states, attention_mask
        if _no_attention(self) or cross_attention_kwargs.keys() - {"temb"} or x.dim() not in (3, 4) or not _here(x):
            return plain(self, x, source, mask, **cross_attention_kwargs)
        if x.dim() == 4:
            x = x.flatten(2).transpose(1, 2)
        B, N = (x if source is None else source).shape[:2]
        if not many_scores(x, self.heads, N):
            return plain(self, hidden_states, source, mask, **cross_attention_kwargs)
        if mask is not None:
            mask = self.prepare_attention_mask(mask, N, B)
            mask = mask.view(B, self.heads, -1, mask.shape[-1])
        if self.group_norm is not None:
            x = self.group_norm(x.transpose(1, 2)).transpose(1, 2)
        x = x.contiguous()  # once, not in each of three products
        q = self.to_q(x)
        if source is None:
            source = x
        elif self.norm_cross is not None:
            source = self.norm_encoder_hidden_states(source)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, self.to_k(source), self.to_v(source)))
        # AttnProcessor2_0 leaves the scale to scaled_dot_product_attention.
        scale = self.scale if type(self.processor).__name__ == "AttnProcessor" else None
        y = attention(q, k, v, bias=added(mask, q), scale=scale)
        y = self.to_out[1](self.to_out[0](y.transpose(1, 2).flatten(2)))
        if hidden_states.dim() == 4:
            y = y.transpose(1, 2).reshape(hidden_states.shape)
        if self.residual_connection:
            y = y + hidden_states
        return y if self.rescale_output_factor == 1 else y / self.rescale_output_factor

    return forward


def _no_attention(m):
    """A reason against `_attention`, or None."""
    kind = type(m.processor)
    if kind.__module__ != _PROCESSORS or kind.__name__ not in _KNOWN:
        return f"its processor is a {kind.__name__}"
    if m.norm_q is not None or m.norm_k is not None or m.spatial_norm is not None or m.only_cross_attention:
        return "norms of queries and keys, a spatial norm or added keys"
    if m.inner_kv_dim != m.inner_dim:
        return f"{m.inner_dim} channels of queries, {m.inner_kv_dim} of keys: attention takes one number of heads"
    return None


def _gated(x, y, gate):
    return gate_residual(x, y.to(x.dtype), gate) if pays("gate", x) else x + gate[:, None] * y


def _block(plain):
    def forward(self, hidden_states, attention_mask=None, encoder_hidden_states=None, encoder_attention_mask=None, timestep=None,
                cross_attention_kwargs=None, class_labels=None, added_cond_kwargs=None):
        x, options = hidden_states, cross_attention_kwargs or {}
        single = self.norm_type == "ada_norm_single"
        norm = self.norm2 if single else self.norm3
        if x.dim() != 3 or not _here(x) or not pays("gate and norm", x) or self._chunk_size is not None or options or watched(norm):
            return plain(self, x, attention_mask, encoder_hidden_states, encoder_attention_mask, timestep, cross_attention_kwargs,
                         class_labels, added_cond_kwargs)
        if single:
            made = self.scale_shift_table + timestep.reshape(len(x), 6, -1)
            shift, scale, gate, *others = (y.squeeze(1) for y in made.chunk(6, 1))
            h = _modulated(self.norm1, x, shift, scale)
        else:
            h, gate, *others = self.norm1(x, timestep, class_labels, hidden_dtype=x.dtype)
        y = self.attn1(h, encoder_hidden_states=encoder_hidden_states if self.only_cross_attention else None,
                       attention_mask=attention_mask)
        gate, shift, scale, last = (t.to(x.dtype) for t in (gate, *others))
        if self.attn2 is None:
            x, h = gate_residual_norm_modulate(x, y.to(x.dtype), gate, shift, scale, norm.weight, norm.bias, eps=norm.eps)
        else:
            x = _gated(x, y, gate)
            x = self.attn2(x, encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask) + x
            h = _modulated(norm, x, shift, scale)
        return _gated(x, self.ff(h), last)

    return forward


def _no_block(m):
    """A reason against `_block`, or None."""
    if m.norm_type not in ("ada_norm_zero", "ada_norm_single"):
        return f"norm_type={m.norm_type!r}: nothing to gain between its layers, which have rules of their own"
    if m.pos_embed is not None or (m.attn2 is not None and m.norm_type == "ada_norm_zero"):
        return "positions or a cross-attention between its gates"
    return None


RULES = (
    Rule("diffusers.models.embeddings", "PatchEmbed", _patch_embed, refuse=flat, inputs=frozenset(("latent",)),
         options=frozenset("height width patch_size in_channels embed_dim layer_norm flatten bias interpolation_scale pos_embed_type "
                           "pos_embed_max_size".split())),
    Rule("diffusers.models.resnet", "ResnetBlock2D", _resnet, refuse=_no_resnet, inputs=frozenset("input_tensor temb args kwargs".split()),
         options=frozenset("in_channels out_channels conv_shortcut dropout temb_channels groups groups_out pre_norm eps non_linearity "
                           "skip_time_act time_embedding_norm kernel output_scale_factor use_in_shortcut up down conv_shortcut_bias "
                           "conv_2d_out_channels".split())),
    Rule(_NORMALIZATION, "AdaLayerNorm", _ada_norm, refuse=_no_layer_norm, inputs=frozenset("x timestep temb".split()),
         options=frozenset("embedding_dim num_embeddings output_dim norm_elementwise_affine norm_eps chunk_dim".split())),
    Rule(_NORMALIZATION, "AdaLayerNormZero", _ada_norm_zero, refuse=_no_layer_norm,
         inputs=frozenset("x timestep class_labels hidden_dtype emb".split()),
         options=frozenset("embedding_dim num_embeddings norm_type bias".split())),
    Rule(_NORMALIZATION, "AdaLayerNormZeroSingle", _ada_norm_zero_single, refuse=_no_layer_norm, inputs=frozenset("x emb".split()),
         options=frozenset("embedding_dim norm_type bias".split())),
    Rule(_NORMALIZATION, "AdaLayerNormContinuous", _ada_norm_continuous, refuse=_no_layer_norm,
         inputs=frozenset("x conditioning_embedding".split()),
         options=frozenset("embedding_dim conditioning_embedding_dim elementwise_affine eps bias norm_type".split())),
    Rule("diffusers.models.activations", "GEGLU", _geglu, inputs=frozenset("hidden_states args kwargs".split()),
         options=frozenset("dim_in dim_out bias".split())),
    Rule("diffusers.models.attention_processor", "Attention", _attention, refuse=_no_attention,
         inputs=frozenset("hidden_states encoder_hidden_states attention_mask cross_attention_kwargs".split()),
         options=frozenset("query_dim cross_attention_dim heads kv_heads dim_head dropout bias upcast_attention upcast_softmax "
                           "cross_attention_norm cross_attention_norm_num_groups qk_norm added_kv_proj_dim added_proj_bias norm_num_groups "
                           "spatial_norm_dim out_bias scale_qk only_cross_attention eps rescale_output_factor residual_connection "
                           "_from_deprecated_attn_block processor out_dim out_context_dim context_pre_only pre_only elementwise_affine "
                           "is_causal".split())),
    Rule("diffusers.models.attention", "BasicTransformerBlock", _block, refuse=_no_block,
         inputs=frozenset("hidden_states attention_mask encoder_hidden_states encoder_attention_mask timestep cross_attention_kwargs "
                          "class_labels added_cond_kwargs".split()),
         options=frozenset("dim num_attention_heads attention_head_dim dropout cross_attention_dim activation_fn num_embeds_ada_norm "
                           "attention_bias only_cross_attention double_self_attention upcast_attention norm_elementwise_affine norm_type "
                           "norm_eps final_dropout attention_type positional_embeddings num_positional_embeddings "
                           "ada_norm_continous_conditioning_embedding_dim ada_norm_bias ff_inner_dim ff_bias attention_out_bias".split())),
)
