"""ADM, the convolutional U-Net of guided diffusion, its upsamplers and its classifier (Dhariwal & Nichol 2021)."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from ..core.check import fail, per_sample
from ..nn import AdaGroupNorm, GroupNorm, LabelEmbedding, SelfAttention, TimestepEmbedding
from ..ops import attention
from .model import Model

# Multipliers of the width, by the size of the image.
MULTIPLIERS = {64: (1, 2, 3, 4), 128: (1, 1, 2, 3, 4), 256: (1, 1, 2, 2, 4, 4), 512: (0.5, 1, 1, 2, 2, 4, 4)}


def _resample(how):
    """Halves ("down") or doubles ("up") an image."""
    if how == "down":
        return nn.AvgPool2d(2)
    return nn.Upsample(scale_factor=2.0, mode="nearest")


def zero(module):
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


class Downsample(nn.Module):
    """A 3x3 convolution of stride 2. padding: 1 on every side, or (left, right, top, bottom)."""

    def __init__(self, channels, out_channels, padding=1):
        super().__init__()
        self.around = None if isinstance(padding, int) else padding
        self.conv = nn.Conv2d(channels, out_channels, 3, 2, 0 if self.around else padding)

    def forward(self, x):
        return self.conv(F.pad(x, self.around) if self.around else x)


class Upsample(nn.Module):
    """Every pixel twice along both axes, then a 3x3 convolution."""

    def __init__(self, channels, out_channels):
        super().__init__()
        self.resample, self.conv = _resample("up"), nn.Conv2d(channels, out_channels, 3, padding=1)

    def forward(self, x):
        return self.conv(self.resample(x))


class ResBlock(nn.Module):
    """skip(x) + gate * conv(AdaGN(conv(silu(GN(x))), emb)), both branches resampled before the first convolution if at all.

    Options  resample: "down", "up" or None. additive: emb is added before the second norm, which then has no scale and shift of it.
             affine, eps: of the second norm. labels: width of a label vector, whose sigmoid(W label + b + 2) is the gate; None: no gate
    """

    def __init__(self, channels, out_channels, emb, *, dropout=0.0, resample=None, additive=False, affine=True, eps=1e-5, labels=None):
        super().__init__()
        self.in_norm, self.in_conv = GroupNorm(32, channels), nn.Conv2d(channels, out_channels, 3, padding=1)
        self.resample = resample and _resample(resample)
        self.out_norm = AdaGroupNorm(32, out_channels, emb, additive=additive, affine=affine, eps=eps)
        self.dropout, self.out_conv = nn.Dropout(dropout), zero(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)
        self.gate = None if labels is None else nn.Linear(labels, out_channels)

    def forward(self, x, emb, label=None):
        h = self.in_norm(x)
        if self.resample:
            h, x = self.resample(h), self.resample(x)
        h = self.out_conv(self.dropout(self.out_norm(self.in_conv(h), emb)))
        if self.gate:
            h = h * torch.sigmoid(self.gate(label) + 2)[..., None, None]
        return self.skip(x) + h


class AttentionBlock(nn.Module):
    """x + W_o attention(W_qkv GN(x)) over the pixels."""

    def __init__(self, channels, heads):
        super().__init__()
        self.norm = GroupNorm(32, channels, silu=False)
        self.attention = SelfAttention(channels, heads=heads, norm=False, residual=False)
        zero(self.attention.out)

    def forward(self, x):
        y = self.attention(self.norm(x).flatten(2).transpose(1, 2))
        return x + y.transpose(1, 2).unflatten(2, x.shape[2:])


class Stage(nn.Sequential):
    """Layers in a row; residual blocks get the conditions too."""

    def forward(self, x, *conditions):
        for layer in self:
            x = layer(x, *conditions) if isinstance(layer, ResBlock) else layer(x)
        return x


class Encoder(Model):
    """Stem, levels of residual blocks with halvings between them, middle: what U-Nets and the classifier begin with.

    Options  channels: of each level. blocks: residual blocks per level. attention: whether an attention block follows each, per level.
             heads: of an attention block, from its channels. block: makes a residual block from (channels, out_channels, resample=None).
             resample: between levels, "residual" (a residual block that resamples), "conv" or "same" (a convolution, padded on every
             side, or right and bottom alone) or "pool". widen: that step changes the width, not the block after it
    """

    def __init__(self, in_channels, channels, *, blocks, attention, heads, block, resample, widen=False):
        super().__init__()
        if resample not in ("residual", "conv", "same", "pool"):
            fail(type(self).__name__, f"resample wants 'residual', 'conv', 'same' or 'pool', got {resample!r}")
        self.halvings, here = len(channels) - 1, channels[0]
        self.input_blocks, self.widths = nn.ModuleList([Stage(nn.Conv2d(in_channels, here, 3, padding=1))]), [here]
        for level, wide in enumerate(channels):
            for _ in range(blocks):
                self.input_blocks.append(Stage(block(here, wide), *self._attention(attention[level], heads, wide)))
                here = wide
                self.widths.append(here)
            if level < self.halvings:
                following = channels[level + 1] if widen else here
                self.input_blocks.append(Stage(self._between("down", here, following, resample, block)))
                here = following
                self.widths.append(here)
        self.middle_block = Stage(block(here, here), *self._attention(True, heads, here), block(here, here))

    @staticmethod
    def _attention(wanted, heads, channels):
        return [AttentionBlock(channels, heads(channels))] if wanted else []

    @staticmethod
    def _between(how, channels, out_channels, resample, block):
        if resample == "residual":
            return block(channels, out_channels, resample=how)
        if resample == "pool" and channels == out_channels:
            return _resample(how)
        if resample == "pool":
            fail("Encoder", f"resample='pool' wants levels of one width, got {channels} and {out_channels}")
        if how == "up":
            return Upsample(channels, out_channels)
        return Downsample(channels, out_channels, (0, 1, 0, 1) if resample == "same" else 1)

    def stem(self, x):
        if any(size % 2**self.halvings for size in x.shape[2:]):
            fail(type(self).__name__, f"x wants a grid that {2**self.halvings} divides, got {tuple(x.shape[2:])}")
        return self.input_blocks[0](x)

    def encode(self, h, *conditions):
        """(the middle's output, the output of every stage) for the stem's output h."""
        outs = [h]
        for stage in self.input_blocks[1:]:
            outs.append(stage(outs[-1], *conditions))
        return self.middle_block(outs[-1], *conditions), outs


class UNet(Encoder):
    """An encoder, and a decoder that takes the encoder's outputs from the last to the first."""

    def __init__(self, in_channels, channels, *, blocks, attention, heads, block, resample, widen=False):
        super().__init__(in_channels, channels, blocks=blocks, attention=attention, heads=heads, block=block, resample=resample,
                         widen=widen)
        self.output_blocks, here, widths = nn.ModuleList(), channels[-1], list(self.widths)
        for level in reversed(range(len(channels))):
            for i in range(blocks + 1):
                stage = [block(here + widths.pop(), channels[level]), *self._attention(attention[level], heads, channels[level])]
                here = channels[level]
                if level and i == blocks:
                    following = channels[level - 1] if widen else here
                    stage.append(self._between("up", here, following, resample, block))
                    here = following
                self.output_blocks.append(Stage(*stage))

    def decode(self, h, outs, *conditions):
        for stage, skip in zip(self.output_blocks, reversed(outs), strict=True):
            h = stage(torch.cat((h, skip), 1), *conditions)
        return h


def heads_of(model, heads, head_dim):
    """A function from an attention block's channels to its heads."""
    if (heads is None) == (head_dim is None):
        fail(model, f"heads and head_dim: wants one of them, got heads={heads}, head_dim={head_dim}")
    return lambda channels: heads or channels // head_dim


def _channels(model, image_size, width, multipliers):
    if multipliers is None and image_size not in MULTIPLIERS:
        fail(model, f"multipliers wants to be given for image_size = {image_size}: there are some for {', '.join(map(str, MULTIPLIERS))}")
    return [int(width * m) for m in multipliers or MULTIPLIERS[image_size]]


def asked(model, name, x, wanted):
    """Refuses an input that is missing, or that the model has no use for; True where there is one."""
    if (x is not None) != wanted:
        fail(model, f"{name} wants {'a tensor' if wanted else 'None for this model'}, got {'None' if wanted else 'a tensor'}")
    return wanted


class ADM(UNet):
    """The noise of an image and where its variance lies between two bounds: a U-Net conditioned on the time and the label.

    Shapes   x (B, in_channels, h, w); t (B,), any real dtype; y (B,) int64 for a model with classes; low_res (B, in_channels, h', w') for
             an upsampler -> (B, out_channels, h, w): noise, then the variances' place
    Options  width: times `multipliers` = channels of a level. blocks: residual blocks per level. attention: the feature sizes of an image
             of image_size at which there is attention, of `heads` heads or of head_dim channels each. resample: as in `Encoder`.
             additive: the embedding is added before a block's second norm instead of scaling and shifting it. low_res: an upsampler
    Units    t in steps of the diffusion process, 0 to 999
    Raises   ValueError for an image that the levels do not divide, for a label or low_res missing or not asked for
    Source   Dhariwal & Nichol 2021, sections 3 and 4, appendices G and I
    """

    _PLAIN: ClassVar = dict(width=256, blocks=2, attention=(32, 16, 8), head_dim=64, classes=1000)
    CONFIGS: ClassVar = {
        "imagenet-64": _PLAIN | dict(image_size=64, width=192, blocks=3, dropout=0.1),
        "imagenet-128": _PLAIN | dict(image_size=128, head_dim=None, heads=4),
        "imagenet-256": _PLAIN | dict(image_size=256),
        "imagenet-256-unconditional": _PLAIN | dict(image_size=256, classes=None),
        "imagenet-512": _PLAIN | dict(image_size=512),
        "lsun-256": _PLAIN | dict(image_size=256, classes=None, dropout=0.1),
        "upsample-64-256": _PLAIN | dict(image_size=256, width=192, head_dim=None, heads=4, low_res=True),
        "upsample-128-512": _PLAIN | dict(image_size=512, width=192, multipliers=MULTIPLIERS[256], attention=(32, 16), low_res=True),
    }

    def __init__(self, image_size, *, width, blocks, attention, multipliers=None, in_channels=3, out_channels=6, heads=None, head_dim=None,
                 classes=None, dropout=0.0, resample="residual", additive=False, low_res=False):
        channels = _channels("ADM", image_size, width, multipliers)
        block = lambda *sizes, resample=None: ResBlock(*sizes, 4 * width, dropout=dropout, resample=resample, additive=additive)
        super().__init__(in_channels * (1 + low_res), channels, blocks=blocks, heads=heads_of("ADM", heads, head_dim), block=block,
                         attention=[image_size >> level in attention for level in range(len(channels))], resample=resample)
        self.low_res = low_res
        self.time_embed = TimestepEmbedding(width, 4 * width)
        self.label_emb = None if classes is None else LabelEmbedding(classes, 4 * width)
        self.head = nn.Sequential(GroupNorm(32, channels[0]), zero(nn.Conv2d(channels[0], out_channels, 3, padding=1)))

    def forward(self, x, t, y=None, low_res=None):
        per_sample("ADM", x, t=t)
        emb = self.time_embed(t)
        if asked("ADM", "y", y, self.label_emb is not None):
            per_sample("ADM", x, y=y)
            emb = emb + self.label_emb(y)
        if asked("ADM", "low_res", low_res, self.low_res):
            x = torch.cat((x, F.interpolate(low_res, x.shape[2:], mode="bilinear")), 1)
        emb = F.silu(emb)
        return self.head(self.decode(*self.encode(self.stem(x), emb), emb))

    def load_guided_diffusion(self, state, *, heads_first):
        """Loads a state dict of guided-diffusion's UNetModel or SuperResModel.

        Options  heads_first: of a model without use_new_attention_order: all published checkpoints but that of 64x64
        """
        self.load_state_dict(renamed(self, state, NAMES, heads_first))


class AttentionPool(nn.Module):
    """What attention makes of the mean of all pixels, which reads itself and all pixels."""

    def __init__(self, channels, size, heads, out_channels):
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.randn(channels, size * size + 1) / channels**0.5)
        self.qkv, self.out = nn.Linear(channels, 3 * channels), nn.Linear(channels, out_channels)

    def forward(self, x):
        if x.shape[2] * x.shape[3] != self.positional_embedding.shape[1] - 1:
            fail("Classifier", f"x wants {self.positional_embedding.shape[1] - 1} pixels where they are pooled, got {tuple(x.shape[2:])}")
        x = x.flatten(2)
        x = (torch.cat((x.mean(2, keepdim=True), x), 2) + self.positional_embedding).transpose(1, 2)
        weights, biases = self.qkv.weight.split((x.shape[2], 2 * x.shape[2])), self.qkv.bias.split((x.shape[2], 2 * x.shape[2]))
        q, k, v = F.linear(x[:, :1], weights[0], biases[0]), *F.linear(x, weights[1], biases[1]).chunk(2, 2)
        q, k, v = (y.unflatten(2, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))
        return self.out(attention(q, k, v).flatten(1))


class Classifier(Encoder):
    """Logits of the labels of a noisy image: the encoder of an ADM with an attention pool. Its gradient guides a sampler.

    Shapes   x (B, in_channels, image_size, image_size); t (B,), any real dtype -> (B, classes)
    Options  as in `ADM`
    Source   Dhariwal & Nichol 2021, section 4 and appendix H
    """

    CONFIGS: ClassVar = {f"imagenet-{size}": dict(image_size=size, blocks=4 if size == 64 else 2) for size in MULTIPLIERS}

    def __init__(self, image_size, *, width=128, blocks=2, attention=(32, 16, 8), multipliers=None, in_channels=3, classes=1000,
                 heads=None, head_dim=64, dropout=0.0, resample="residual", additive=False):
        channels = _channels("Classifier", image_size, width, multipliers)
        heads = heads_of("Classifier", heads, head_dim)
        block = lambda *sizes, resample=None: ResBlock(*sizes, 4 * width, dropout=dropout, resample=resample, additive=additive)
        super().__init__(in_channels, channels, blocks=blocks, heads=heads, block=block, resample=resample,
                         attention=[image_size >> level in attention for level in range(len(channels))])
        self.time_embed = TimestepEmbedding(width, 4 * width)
        last = channels[-1]
        self.head = nn.Sequential(GroupNorm(32, last), AttentionPool(last, image_size >> self.halvings, heads(last), classes))

    def forward(self, x, t):
        per_sample("Classifier", x, t=t)
        return self.head(self.encode(self.stem(x), F.silu(self.time_embed(t)))[0])

    def guidance(self, x, t, y):
        """The gradient of log p(y | x) by x, which moves a sampler's mean."""
        per_sample("Classifier", x, y=y)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            chosen = F.log_softmax(self(x, t), -1).gather(1, y.unsqueeze(1))
            return torch.autograd.grad(chosen.sum(), x)[0]

    def load_guided_diffusion(self, state, *, heads_first):
        """Loads a state dict of guided-diffusion's EncoderUNetModel; heads_first: of a model without use_new_attention_order."""
        self.load_state_dict(renamed(self, state, NAMES, heads_first))


# guided-diffusion's names and those here, replaced in this order. Its 1x1 convolutions over pixels are linear layers here.
NAMES = {"out.0.": "head.0.", "out.2.": "head.1.", "time_embed.": "time_embed.mlp.", "label_emb.": "label_emb.embedding_table.",
         "in_layers.0": "in_norm", "in_layers.2": "in_conv", "emb_layers.1": "out_norm.proj", "out_layers.0": "out_norm",
         "out_layers.3": "out_conv", "skip_connection": "skip", ".op.": ".conv.", ".qkv.": ".attention.qkv.",
         ".proj_out.": ".attention.out.", "qkv_proj": "qkv", "c_proj": "out"}


def renamed(model, state, names, heads_first):
    """A published state dict, or gradients under its names, under the names and in the layouts of `model`.

    Options  heads_first: rows of attention's qkv are ordered (head, one of q, k, v, channel), not (one of q, k, v, head, channel)
    """
    made = {}
    for name, value in state.items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        if value.dim() > 2 and value.dim() != model.get_parameter(name).dim():
            value = value.flatten(1)
        path = name.rpartition(".")[0]
        if heads_first and path.endswith(".attention.qkv"):
            heads = model.get_submodule(path.removesuffix(".qkv")).heads
            value = value.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)
        made[name] = value
    return made
