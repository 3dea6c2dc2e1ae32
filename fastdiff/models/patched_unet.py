"""The patched U-Net: a U-Net on the patches of an image (Luhman & Luhman 2022)."""

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from ..core.check import fail, per_sample
from ..nn import GroupNorm, LabelEmbedding, TimestepEmbedding
from ..ops import depth_to_space, space_to_depth
from . import adm


def position_code(channels, size, like):
    """(1, channels, h, w): sin(64 x / w r_k), then sin(64 y / h r_k), r_k = 10000^(-k / (channels / 2 - 1))."""
    half = channels // 2
    rate = torch.exp(torch.arange(half, dtype=torch.float64, device=like.device) * (-math.log(10000) / max(half - 1, 1)))
    y, x = (torch.sin(rate.unsqueeze(1) * torch.arange(n, dtype=torch.float64, device=like.device) * (64 / n)) for n in size)
    code = torch.cat((x.unsqueeze(1).expand(-1, *size), y.unsqueeze(2).expand(-1, *size)))
    return code.unsqueeze(0).to(like.dtype)


class PatchedUNet(adm.UNet):
    """The clean image, and where the variance of its noise lies between two bounds: an ADM U-Net on space_to_depth(x, patch).

    Shapes   x (B, in_channels, h, w); t (B,), any real dtype; y (B,) int64 for a model with classes -> (B, in_channels, h, w), and as many
             channels again with variance=True, in (0, 1)
    Options  as in `ADM`; patch: pixels along each axis. attention: feature sizes of a patched image of image_size. null: a label more,
             `classes`, for guidance. variance: a head of its own, which trains nothing of the trunk. resample: as in `adm.Encoder`
    Units    t in steps of the diffusion process, 0 to 999
    Raises   ValueError for an image that patch and levels do not divide, for a label missing or not asked for
    Source   Luhman & Luhman 2022, section 3
    """

    CONFIGS: ClassVar = {
        "ffhq-1024": dict(image_size=1024, patch=4, width=128, multipliers=(1, 2, 2, 4, 4, 4), blocks=2),
        "imagenet-256": dict(image_size=256, patch=4, width=256, multipliers=(1, 2, 2, 2), blocks=3, classes=1000),
        "lsun-256-p2": dict(image_size=256, patch=2, width=128, multipliers=(1, 2, 2, 4, 4), blocks=2),
        "lsun-256-p4": dict(image_size=256, patch=4, width=256, multipliers=(1, 1, 2, 2), blocks=2),
        "lsun-256-p8": dict(image_size=256, patch=8, width=256, multipliers=(1, 1.5, 2), blocks=3),
    }

    def __init__(self, image_size, *, patch, width, multipliers, blocks, attention=(16, 8), in_channels=3, heads=None, head_dim=64,
                 classes=None, null=True, variance=True, dropout=0.0, resample="same"):
        channels = [int(width * m) for m in multipliers]
        if variance and channels[0] != width:
            fail("PatchedUNet", f"multipliers wants to begin with 1 beside a variance head, got {multipliers}")
        emb, pixels = channels[-1], in_channels * patch**2
        labels = None if classes is None else channels[0]
        block = lambda *sizes, resample=None: adm.ResBlock(*sizes, emb, dropout=dropout, resample=resample, affine=False, eps=1e-3,
                                                           labels=labels)
        super().__init__(pixels, channels, blocks=blocks, heads=adm.heads_of("PatchedUNet", heads, head_dim), block=block, widen=True,
                         attention=[image_size // patch >> level in attention for level in range(len(channels))], resample=resample)
        for module in self.modules():
            if isinstance(module, adm.ResBlock):
                adm.zero(module.out_norm.proj)
        self.patch = patch
        self.time_embed = TimestepEmbedding(width, emb, width=4 * width, order="sin cos", last=True)
        self.label_emb = None if classes is None else LabelEmbedding(classes + null, labels)
        self.head = nn.Sequential(GroupNorm(32, width), adm.zero(nn.Conv2d(width, pixels, 3, padding=1)))
        self.variance = _VarianceHead(width, emb, pixels) if variance else None

    def forward(self, x, t, y=None):
        per_sample("PatchedUNet", x, t=t)
        first = self.stem(space_to_depth(x, self.patch))
        first = first + position_code(first.shape[1], first.shape[2:], first)
        emb = F.silu(self.time_embed(t))
        conditions = (emb,)
        if adm.asked("PatchedUNet", "y", y, self.label_emb is not None):
            per_sample("PatchedUNet", x, y=y)
            conditions = emb, self.label_emb(y)
        last = self.decode(*self.encode(first, *conditions), *conditions)
        out = depth_to_space(self.head(last), self.patch)
        if self.variance is None:
            return out
        return torch.cat((out, depth_to_space(self.variance(first.detach(), last.detach(), emb), self.patch)), 1)

    def load_patch_diffusion(self, state, *, heads_first):
        """Loads a state dict of PatchDiffusion-Pytorch's UNetModel; heads_first: of a model without use_new_attention_order."""
        self.load_state_dict(adm.renamed(self, state, NAMES, heads_first))


class _VarianceHead(nn.Module):
    """sigmoid(conv(silu(conv([first | last] + W silu(emb) + b))))."""

    def __init__(self, width, emb, pixels):
        super().__init__()
        self.emb = nn.Linear(emb, 2 * width)
        self.convs = nn.Sequential(nn.Conv2d(2 * width, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, pixels, 3, padding=1))

    def forward(self, first, last, emb):
        return torch.sigmoid(self.convs(torch.cat((first, last), 1) + self.emb(F.silu(emb))[..., None, None]))


# PatchDiffusion-Pytorch's names and those here, replaced in this order.
NAMES = {"out.0.": "head.0.", "out.2.": "head.1.", "time_embed.": "time_embed.mlp.", "label_embs.": "label_emb.embedding_table.",
         "in_layers.0": "in_norm", "in_layers.2": "in_conv", "emb_layers": "out_norm.proj", "out_layers.2": "out_conv",
         "classemb_proj": "gate", "skip_connection": "skip", ".op.": ".conv.", ".qkv.": ".attention.qkv.",
         ".proj_out.": ".attention.out.", "variance_output_t_emb": "variance.emb", "variance_output_model": "variance.convs"}
