"""diffusers: patch embeddings."""

from .patches import embeddable, embedded, flat
from .rule import Rule


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


RULES = (
    Rule("diffusers.models.embeddings", "PatchEmbed", _patch_embed, refuse=flat, inputs=frozenset(("latent",)),
         options=frozenset("height width patch_size in_channels embed_dim layer_norm flatten bias interpolation_scale pos_embed_type "
                           "pos_embed_max_size".split())),
)
