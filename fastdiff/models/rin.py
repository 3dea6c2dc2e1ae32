"""RIN, Recurrent Interface Networks (Jabri et al. 2022, with the released code's choices; Chen 2023 for the larger sizes)."""

import re
from math import prod, sqrt
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ..core.check import fail
from ..nn import MLP, CrossAttention, PatchEmbed, SelfAttention, Unpatch
from .model import Model

EPS = 1e-6


class Output(NamedTuple):
    """What a step gives: the prediction, and the latents and the interface, which the next step may start from."""

    image: torch.Tensor
    latents: torch.Tensor
    interface: torch.Tensor


class Scalar(nn.Module):
    """A scalar as a vector: sines and cosines of its multiples, standardised, through two layers."""

    def __init__(self, features, dim, scale):
        super().__init__()
        self.features, self.scale = features, scale
        self.up, self.down = nn.Linear(features, dim), nn.Linear(dim, dim)

    def forward(self, x):
        rates = 10000.0 ** (torch.arange(0, self.features, 2, dtype=torch.float64, device=x.device) / -self.features)
        angles = self.scale * x.double().unsqueeze(-1) * rates
        waves = F.layer_norm(torch.cat((angles.sin(), angles.cos()), -1), (self.features,), eps=0.0)
        return self.down(F.silu(self.up(waves.to(self.up.weight.dtype))))


class Layer(nn.Module):
    """A layer of the latents alone, its branches dropped for whole samples with probability drop_path while training."""

    def __init__(self, dim, hidden, heads, dropout, drop_path):
        super().__init__()
        self.drop_path = drop_path
        self.attention = SelfAttention(dim, heads=heads, residual=False, eps=EPS)
        self.mlp = MLP(dim, hidden, dropout=dropout, residual=False, eps=EPS)

    def forward(self, z):
        z = z + self._drop(self.attention(z))
        return z + self._drop(self.mlp(z))

    def _drop(self, y):
        if not self.training or self.drop_path == 0:
            return y
        keep = 1 - self.drop_path
        return y * y.new_empty((y.shape[0], 1, 1)).bernoulli_(keep).div_(keep)


class Block(nn.Module):
    """Latents read the interface, think by themselves, and write to the interface; a block without layers only reads."""

    def __init__(self, dim, latent_dim, layers, heads, latent_heads, hidden, latent_hidden, source_norm, dropout, drop_path):
        super().__init__()
        cross = dict(heads=heads, source_norm=source_norm, eps=EPS)
        self.read, self.read_mlp = CrossAttention(latent_dim, dim, **cross), MLP(latent_dim, latent_hidden, eps=EPS)
        self.layers = nn.ModuleList(Layer(latent_dim, latent_hidden, latent_heads, dropout, drop_path) for _ in range(layers))
        self.write = CrossAttention(dim, latent_dim, **cross) if layers else None
        self.write_mlp = MLP(dim, hidden, eps=EPS) if layers and hidden else None

    def forward(self, z, x, tokens):
        z = self.read_mlp(self.read(z, x if tokens is None else torch.cat((x, tokens), 1)))
        for layer in self.layers:
            z = layer(z)
        x = x if self.write is None else self.write(x, z)
        return z, x if self.write_mlp is None else self.write_mlp(x)


class Previous(nn.Module):
    """What self-conditioning adds for the state z of the step before: LN(z + MLP(z)), nothing until it is trained."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.mlp, self.norm = MLP(dim, hidden, eps=EPS), nn.LayerNorm(dim, EPS)

    def forward(self, z):
        return self.norm(self.mlp(z))


def _imagenet(size, latents, blocks, layers):
    return dict(size=(size, size), patch=8, dim=512, latents=latents, latent_dim=768, layers=(layers,) * blocks, heads=16, latent_heads=16,
                classes=1000)


class RIN(Model):
    """A denoiser whose work is done on a few latents, which read the image's patches (the interface) and write to them.

    Shapes   image (B, channels, *size) with the 1 to 3 axes of `size`; gamma (B,); label (B, classes), or (B,) int64, None for none;
             latents (B, latents, latent_dim) and interface (B, prod(size / patch), dim) of the step before, None at the first
             -> Output of the same three shapes
    Units    gamma: share of the signal in the variance, in (0, 1)
    Options  latents: their number, with the time token and the class token if these are among them; layers: of latents, block by block;
             heads: of reads and writes; *_ratio: hidden width over width, 0 for no MLP after writes. tokens: "latents", or "interface":
             time and class are read beside the patches and never written to. previous: "latents", or "both": where self-conditioning
             starts from the step before. source_norm: reads and writes normalise what they look at. dropout: of the latent layers' hidden
             units; drop_path: of their branches
    Raises   ValueError for an image, a state or a label of another size
    Source   Jabri et al. 2022, sections 3 and 4; google-research/pix2seq, architectures/tape.py
    """

    CONFIGS: ClassVar = {
        # The released default, of any size: from_config("base", size=(64, 64)).
        "base": dict(patch=8, dim=128, latents=32, latent_dim=256, layers=(4,) * 4, heads=1, latent_heads=4, mlp_ratio=2,
                     tokens="interface"),
        "cifar-10": dict(size=(32, 32), patch=2, dim=256, latents=128, latent_dim=512, layers=(2, 2, 2), heads=8, latent_heads=16,
                         mlp_ratio=2, classes=10, dropout=0.1, drop_path=0.1),
        "imagenet-64": _imagenet(64, 128, 4, 4),
        "noise-schedule-64": _imagenet(64, 128, 4, 6),
        "noise-schedule-128": _imagenet(128, 128, 6, 6),
        "noise-schedule-256": _imagenet(256, 256, 6, 6),
        "noise-schedule-512": _imagenet(512, 256, 6, 6),
        "noise-schedule-768": _imagenet(768, 256, 6, 8),
        "noise-schedule-1024": _imagenet(1024, 256, 6, 8)}

    def __init__(self, size, *, patch, dim, latents, latent_dim, layers, heads, latent_heads, channels=3, classes=0, mlp_ratio=4,
                 latent_mlp_ratio=4, tokens="latents", previous="latents", source_norm=False, time_scale=1000.0, dropout=0.0,
                 drop_path=0.0):
        super().__init__()
        for name, value, choices in (("tokens", tokens, ("latents", "interface")), ("previous", previous, ("latents", "both"))):
            if value not in choices:
                fail("RIN", f"{name} wants {' or '.join(map(repr, choices))}, got {value!r}")
        patch = (patch,) * len(size) if isinstance(patch, int) else tuple(patch)
        if len(patch) != len(size) or any(n % p for n, p in zip(size, patch, strict=True)):
            fail("RIN", f"patch wants divisors of the size {tuple(size)}, got {patch}")
        self.size, self.grid = tuple(size), tuple(n // p for n, p in zip(size, patch, strict=True))
        self.channels, self.classes, self.tokens = channels, classes, tokens
        self.state = ((latents, latent_dim), (prod(self.grid), dim))
        hidden, latent_hidden = mlp_ratio * dim, latent_mlp_ratio * latent_dim
        token_dim = latent_dim if tokens == "latents" else dim
        if token_dim % 8:
            fail("RIN", f"{'latent_dim' if tokens == 'latents' else 'dim'} wants a multiple of 8, for the time token, got {token_dim}")
        rows = latents - (1 + (classes > 0)) * (tokens == "latents")

        self.stem, self.stem_norm = PatchEmbed(channels, dim, patch, axes=len(size)), nn.LayerNorm(dim, EPS)
        self.position, self.latents = nn.Parameter(torch.empty(self.state[1])), nn.Parameter(torch.empty(rows, latent_dim))
        self.time = Scalar(token_dim // 4, token_dim, time_scale)
        self.label = nn.Linear(classes, token_dim) if classes else None
        self.previous_latents = Previous(latent_dim, latent_hidden)
        self.previous_interface = Previous(dim, hidden) if previous == "both" else None
        self.blocks = nn.ModuleList(Block(dim, latent_dim, n, heads, latent_heads, hidden, latent_hidden, source_norm, dropout, drop_path)
                                    for n in layers)
        self.norm, self.out = nn.LayerNorm(dim, EPS), Unpatch(dim, channels, patch, axes=len(size))
        self._initialize()

    def forward(self, image, gamma, label=None, latents=None, interface=None):
        latents, interface = self._checked(image, label, latents, interface)
        tokens = self._tokens(gamma, label)
        x = self.stem_norm(self.stem(image)) + self.position
        z = self.latents.expand(x.shape[0], -1, -1)
        if self.tokens == "latents":
            z, tokens = torch.cat((z, tokens), 1), None
        z = z + self.previous_latents(latents)
        if self.previous_interface is not None:
            x = x + self.previous_interface(interface)
        for block in self.blocks:
            z, x = block(z, x, tokens)
        return Output(self.out(self.norm(x), self.grid), z, x)

    def _tokens(self, gamma, label):
        """(B, 1 or 2, width): time, and class where there are classes; no class is a vector of zeros."""
        time = self.time(gamma)
        if self.label is None:
            return time.unsqueeze(1)
        if label is None:
            label = time.new_zeros((time.shape[0], self.classes))
        elif label.dtype == torch.int64:
            label = F.one_hot(label, self.classes)
        return torch.stack((time, self.label(label.to(time.dtype))), 1)

    def _checked(self, image, label, latents, interface):
        """The states, one row of zeros for all where there are none: no state is not the same as no self-conditioning."""
        B = image.shape[0]
        for name, x, wanted in (("image", image, (B, self.channels, *self.size)), ("latents", latents, (B, *self.state[0])),
                                ("interface", interface, (B, *self.state[1]))):
            if x is not None and tuple(x.shape) != wanted:
                fail("RIN", f"{name} wants {wanted}, got {tuple(x.shape)}")
        if label is not None and tuple(label.shape) not in ((B,), (B, self.classes)):
            fail("RIN", f"label wants ({B},) or ({B}, {self.classes}), got {tuple(label.shape)}")
        if interface is not None and self.previous_interface is None:
            fail("RIN", "interface wants None where previous is 'latents', got a tensor")
        zeros = lambda x, size: image.new_zeros((1, 1, size[1])) if x is None else x
        return zeros(latents, self.state[0]), interface if self.previous_interface is None else zeros(interface, self.state[1])

    @torch.no_grad()
    def _initialize(self):
        """As the original: uniform after Glorot & Bengio 2010, with Keras' fans; tables normal, cut at two standard deviations;
        self-conditioning adds nothing."""
        for path, module, rows, heads in self._variables():
            if not isinstance(module, nn.LayerNorm):
                # Keras takes the axes before the last two for a convolution's window, heads or not.
                *window, before, after = _kernel_shape(path, module, rows, heads)
                bound = sqrt(6 / (prod(window) * (before + after)))
                module.weight[rows].uniform_(-bound, bound)
                module.bias[rows].zero_()
        for table in (self.position, self.latents):
            nn.init.trunc_normal_(table, std=0.02, a=-0.04, b=0.04)
        for previous in filter(None, (self.previous_latents, self.previous_interface)):
            previous.norm.weight.zero_()

    @classmethod
    def from_pix2seq(cls, variables, **options):
        """The original's weights: {variable's path: array or tensor}, as TensorFlow names it below the model, "stem/kernel" or
        "read_unit_0/transformer_decoder_layer/cross_mha/query/kernel" (the tables: "latent_pos_emb", "tape_pos_emb").

        Options  of RIN; the weights fit one choice of them only
        Raises   ValueError for a variable that is missing, too many, or of another shape
        """
        return cls(**options)._load("from_pix2seq", {path: torch.as_tensor(x) for path, x in variables.items()}, lambda path: path)

    @classmethod
    def from_rin_pytorch(cls, source, **options):
        """The weights of leon-w/rin-pytorch's `Rin`, after one call of it, or its state dict; integers (seeds) are left aside.

        Options, Raises  as `from_pix2seq`
        """
        source = source.state_dict() if isinstance(source, nn.Module) else source
        return cls(**options)._load("from_rin_pytorch", {k: x for k, x in source.items() if x.is_floating_point()}, _rin_pytorch)

    @torch.no_grad()
    def _load(self, op, theirs, rename):
        theirs, dtype = dict(theirs), next(iter(theirs.values())).dtype

        def take(path, shape):
            name = rename(path)
            if name not in theirs or tuple(theirs[name].shape) != shape:
                given = tuple(theirs[name].shape) if name in theirs else "nothing"
                fail(op, f"{name} wants {shape}, got {given}")
            return theirs.pop(name)

        self.to(dtype)
        for path, module, rows, heads in self._variables():
            if isinstance(module, nn.LayerNorm):
                module.weight.copy_(take(f"{path}/gamma", tuple(module.weight.shape)))
                module.bias.copy_(take(f"{path}/beta", tuple(module.bias.shape)))
            else:
                shape, weight = _kernel_shape(path, module, rows, heads), module.weight[rows]
                kernel = take(f"{path}/kernel", shape)
                weight.copy_(kernel.reshape(weight.shape[1], -1).T if weight.dim() == 2 else kernel.movedim((-1, -2), (0, 1)))
                split = shape[1:] if heads and not path.endswith("output") else shape[-1:]
                module.bias[rows].copy_(take(f"{path}/bias", split).flatten())
        self.position.copy_(take("tape_pos_emb", tuple(self.position.shape)))
        self.latents.copy_(take("latent_pos_emb", tuple(self.latents.shape)))
        if theirs:
            fail(op, f"the model has no place for {', '.join(sorted(theirs))}")
        return self

    def _variables(self):
        """(path in the original, module here, rows of its weight, heads) of everything but the tables."""
        yield from ((path, module, ALL, 0) for path, module in (
            ("stem", self.stem.proj), ("stem_ln", self.stem_norm), ("time_emb/dense0", self.time.up), ("time_emb/dense1", self.time.down),
            ("output_ln", self.norm), ("output_linear", self.out.linear)))
        if self.label is not None:
            yield "cond_proj", self.label, ALL, 0
        for name, previous in (("latent", self.previous_latents), ("tape", self.previous_interface)):
            if previous is not None:
                yield from _mlp(f"{name}_prev_proj/ffn", previous.mlp)
                yield f"{name}_prev_ln", previous.norm, ALL, 0
        for b, block in enumerate(self.blocks):
            for name, cross, mlp in (("read", block.read, block.read_mlp), ("write", block.write, block.write_mlp)):
                path = f"{name}_unit_{b}/transformer_decoder_layer"
                if cross is not None:
                    yield from _cross(f"{path}/cross_mha", cross)
                if mlp is not None:
                    yield from _mlp(f"{path}/mlp/ffn", mlp)
            for k, layer in enumerate(block.layers):
                path = f"latent_processing_unit{b}/transformer_encoder{f'_{k}' if k else ''}"
                yield from _self(f"{path}/mha", layer.attention)
                yield from _mlp(f"{path}/mlp/ffn", layer.mlp)


# The names of the original's variables, and their shapes: a kernel is (in, out), (in, heads, width) or (heads, width, out).

ALL = slice(None)


def _mlp(path, m):
    return (f"{path}/ln", m.norm, ALL, 0), (f"{path}/dense1", m.up, ALL, 0), (f"{path}/dense2", m.down, ALL, 0)


def _cross(path, m):
    heads = m.options["heads"]
    yield from ((f"{path}/{name}", part, ALL, heads) for name, part in
                (("query", m.query), ("key", m.key), ("value", m.value), ("attention_output", m.out)))
    yield from ((f"{path}/{name}", norm, ALL, 0) for name, norm in (("ln", m.target_norm), ("enc_ln", m.source_norm)) if norm is not None)


def _self(path, m):
    width = m.out.in_features
    yield from ((f"{path}/{name}", m.qkv, slice(i * width, (i + 1) * width), m.heads) for i, name in enumerate(("query", "key", "value")))
    yield from ((f"{path}/attention_output", m.out, ALL, m.heads), (f"{path}/ln", m.norm, ALL, 0))


def _kernel_shape(path, module, rows, heads):
    out, into, *window = module.weight[rows].shape
    if not heads:
        return (*window, into, out)
    return (heads, into // heads, out) if path.endswith("output") else (into, heads, out // heads)


def _rin_pytorch(path):
    """The name in leon-w/rin-pytorch's state dict of the original's variable."""
    for pattern, name in ((r"(read|write)_unit_(\d+)/transformer_decoder_layer", r"\1_units/\2"),
                          (r"latent_processing_unit(\d+)/transformer_encoder(?=/)", r"latent_processing_units/\1/enc_layers/0"),
                          (r"latent_processing_unit(\d+)/transformer_encoder_", r"latent_processing_units/\1/enc_layers/"),
                          (r"cross_mha/(enc_)?ln", lambda m: "enc_ln" if m[1] else "cross_ln"), (r"/mha/ln", "/mha_ln"),
                          (r"/(query|key|value)/", r"/_\1_dense/"), (r"/attention_output/", "/_output_dense/"),
                          (r"/ffn/ln/", "/layernorms/0/"), (r"/ffn/dense", "/mlp_layers/0/dense"), (r"time_emb/dense", "time_emb/dense_"),
                          (r"/(kernel|gamma)$", "/torch_params/0"), (r"/(bias|beta)$", "/torch_params/1"), (r"/", ".")):
        path = re.sub(pattern, name, path)
    return path
