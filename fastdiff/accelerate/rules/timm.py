"""timm: patch embeddings and attention of vision transformers."""

from ...ops import attention
from .patches import embeddable, embedded, flat
from .rule import Rule, added, dropout_note, many_scores


def _patch_embed(plain):
    def forward(self, x):
        if not embeddable(x, self.proj) or (getattr(self, "strict_img_size", True) and self.img_size not in (None, tuple(x.shape[2:]))):
            return plain(self, x)
        return self.norm(embedded(x, self.proj))

    return forward


def _attention(plain):
    def forward(self, x, attn_mask=None, is_causal=False):
        if ((self.training and self.attn_drop.p > 0) or x.dim() != 3 or x.device.type not in ("cpu", "cuda")
                or (attn_mask is not None and is_causal) or not many_scores(x, self.num_heads, x.shape[1])):
            return plain(self, x, attn_mask, is_causal)
        gate = None if self.gate is None else self.gate(x).sigmoid()
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        y = self.norm(attention(q, k, v, bias=added(attn_mask, q), causal=is_causal, scale=self.scale).transpose(1, 2).flatten(2))
        return self.proj_drop(self.proj(y if gate is None else y * gate))

    return forward


RULES = (
    Rule("timm.layers.patch_embed", "PatchEmbed", _patch_embed, refuse=flat, inputs=frozenset("x"),
         options=frozenset("img_size patch_size in_chans embed_dim norm_layer flatten output_fmt bias strict_img_size dynamic_img_pad "
                           "device dtype".split())),
    Rule("timm.layers.attention", "Attention", _attention, note=lambda m: dropout_note(m.attn_drop),
         inputs=frozenset("x attn_mask is_causal".split()),
         options=frozenset("dim num_heads attn_head_dim dim_out qkv_bias qk_norm scale_norm proj_bias gated attn_drop proj_drop norm_layer "
                           "device dtype".split())),
    Rule("timm.layers.norm", "LayerNorm", leave="PyTorch's layer norm is one pass already"),
    Rule("timm.layers.layer_scale", "LayerScale", leave="one pass over its input already"),
)
