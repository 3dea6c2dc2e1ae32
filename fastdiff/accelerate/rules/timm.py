"""timm: patch embeddings."""

from .patches import embeddable, embedded, flat
from .rule import Rule


def _patch_embed(plain):
    def forward(self, x):
        if not embeddable(x, self.proj) or (getattr(self, "strict_img_size", True) and self.img_size not in (None, tuple(x.shape[2:]))):
            return plain(self, x)
        return self.norm(embedded(x, self.proj))

    return forward


RULES = (
    Rule("timm.layers.patch_embed", "PatchEmbed", _patch_embed, refuse=flat, inputs=frozenset("x"),
         options=frozenset("img_size patch_size in_chans embed_dim norm_layer flatten output_fmt bias strict_img_size dynamic_img_pad "
                           "device dtype".split())),
)
