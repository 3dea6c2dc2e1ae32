"""Times and labels as vectors."""

import math

import torch
from torch import nn

from ..core.check import fail
from . import foreign

_PACKAGE = "diffusers.models.embeddings"


def sinusoid(t, dim, *, order="cos sin", last=False):
    """[cos(t w_k), sin(t w_k)], w_k = 10000^(-k / (dim / 2)), k = 0 ... dim / 2 - 1; computed in float64.

    Shapes   t (B,), any real dtype -> (B, dim), float64
    Options  order: "cos sin" (ADM, DiT) or "sin cos"; last: the last w_k is 1 / 10000, k being divided by dim / 2 - 1 (DDPM)
    Raises   ValueError for an odd dim and an unknown order
    Source   Vaswani et al. 2017, section 3.5; Ho et al. 2020, appendix B
    """
    if dim % 2:
        fail("sinusoid", f"dim wants an even number, got {dim}")
    if order not in ("cos sin", "sin cos"):
        fail("sinusoid", f"order wants 'cos sin' or 'sin cos', got {order!r}")
    half = dim // 2
    k = torch.arange(half, dtype=torch.float64, device=t.device)
    angle = t.double().unsqueeze(-1) * torch.exp(k * (-math.log(10000) / max(half - last, 1)))
    pair = angle.cos(), angle.sin()
    return torch.cat(pair if order == "cos sin" else pair[::-1], -1)


class TimestepEmbedding(nn.Module):
    """W_2 silu(W_1 sinusoid(t) + b_1) + b_2.

    Shapes   t (B,), any real dtype -> (B, out_dim)
    Options  width: of the hidden layer, out_dim unless given; order, last: as in `sinusoid`
    State    mlp.0, mlp.2: nn.Linear, as DiT's TimestepEmbedder; mlp: as guided-diffusion's time_embed
    Source   Ho et al. 2020, appendix B; Peebles & Xie 2023, section 3.2
    """

    def __init__(self, dim, out_dim, *, width=None, order="cos sin", last=False):
        super().__init__()
        width = out_dim if width is None else width
        self.dim, self.options = dim, dict(order=order, last=last)
        self.mlp = nn.Sequential(nn.Linear(dim, width), nn.SiLU(), nn.Linear(width, out_dim))

    def forward(self, t):
        return self.mlp(sinusoid(t, self.dim, **self.options).to(self.mlp[0].weight.dtype))

    def extra_repr(self):
        return ", ".join([f"dim={self.dim}", *(f"{name}={value!r}" for name, value in self.options.items())])

    @classmethod
    def from_diffusers(cls, timesteps, layer):
        """diffusers' Timesteps and the TimestepEmbedding that takes their result; weights are copied.

        Raises   ValueError for other layers, other frequencies and layers with more than silu between two linear layers
        """
        foreign.of("from_diffusers: timesteps", timesteps, f"{_PACKAGE}.Timesteps")
        foreign.of("from_diffusers: layer", layer, f"{_PACKAGE}.TimestepEmbedding")
        if timesteps.downscale_freq_shift not in (0, 1) or timesteps.scale != 1:
            fail("from_diffusers", "timesteps wants downscale_freq_shift 0 or 1 and scale 1, got "
                                   f"{timesteps.downscale_freq_shift} and {timesteps.scale}")
        extra = [name for name in ("cond_proj", "post_act") if getattr(layer, name) is not None]
        if extra or not isinstance(layer.act, nn.SiLU) or layer.linear_1.bias is None:
            fail("from_diffusers", f"layer wants two linear layers with biases and silu between them, got {layer}")
        one, two = layer.linear_1, layer.linear_2
        made = cls(one.in_features, two.out_features, width=one.out_features, last=timesteps.downscale_freq_shift == 1,
                   order="cos sin" if timesteps.flip_sin_to_cos else "sin cos")
        for mine, theirs in ((made.mlp[0], one), (made.mlp[2], two)):
            mine.load_state_dict(theirs.state_dict())
        return made.to(one.weight)


class LabelEmbedding(nn.Module):
    """A row of a table per label; in training a label is replaced by the null label with the probability `dropout`.

    Shapes   labels (B,) int64 in [0, classes], drop (B,) bool or None -> (B, dim)
    Options  dropout: above 0, the table has one row more, the null label's: `classes`. drop: the labels to replace, in any mode; drawn in
             training unless given
    State    embedding_table: nn.Embedding, as DiT's LabelEmbedder and diffusers' LabelEmbedding; itself as guided-diffusion's label_emb
    Raises   ValueError for drop where there is no null label
    Source   Ho & Salimans 2022, section 3.2
    """

    def __init__(self, classes, dim, dropout=0.0):
        super().__init__()
        self.classes, self.dropout = classes, dropout
        self.embedding_table = nn.Embedding(classes + (dropout > 0), dim)

    def forward(self, labels, drop=None):
        if drop is None and self.training and self.dropout > 0:
            drop = torch.rand(labels.shape, device=labels.device) < self.dropout
        if drop is not None:
            labels = torch.where(drop, self.null(), labels)
        return self.embedding_table(labels)

    def null(self):
        """The null label."""
        if self.dropout == 0:
            fail("LabelEmbedding", "dropout wants to be above 0 for a null label, got 0")
        return self.classes

    def extra_repr(self):
        return f"classes={self.classes}, dropout={self.dropout}"

    @classmethod
    def from_diffusers(cls, layer):
        """A `diffusers.models.embeddings.LabelEmbedding`; the table is copied.

        Raises   ValueError for another layer
        """
        foreign.of("from_diffusers: layer", layer, f"{_PACKAGE}.LabelEmbedding")
        made = cls(layer.num_classes, layer.embedding_table.embedding_dim, layer.dropout_prob)
        made.load_state_dict(layer.state_dict())
        return made.to(layer.embedding_table.weight)
