"""DiT, the diffusion transformer (Peebles & Xie 2023)."""

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from ..core.check import fail, per_sample
from ..nn import LabelEmbedding, PatchEmbed, SelfAttention, TimestepEmbedding, Unpatch
from ..ops import gate_residual_norm_modulate, layer_norm_modulate
from .model import Model

EPS = 1e-6


def position_table(grid, dim):
    """(h w, dim), float32: [sin, cos] of the column in the first half, of the row in the second, at 10000^(-k / (dim / 4))."""
    if dim % 4:
        fail("position_table", f"dim wants a multiple of 4, got {dim}")
    rate = torch.exp(torch.arange(dim // 4, dtype=torch.float64) * (-math.log(10000) / (dim // 4)))
    row, column = (torch.arange(n, dtype=torch.float64).unsqueeze(1) * rate for n in grid)
    code = lambda angle: torch.cat((angle.sin(), angle.cos()), 1)
    table = torch.cat((code(column).expand(*grid, -1), code(row).unsqueeze(1).expand(*grid, -1)), 2)
    return table.flatten(0, 1).float()


class MLP(nn.Module):
    """fc2(gelu(fc1(x))), gelu by tanh."""

    def __init__(self, dim, width):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, width), nn.Linear(width, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """What a block has; `DiT.forward` says how it is used, for a norm is computed with the gate before it, across blocks."""

    def __init__(self, dim, heads, width):
        super().__init__()
        self.attn = SelfAttention(dim, heads=heads, norm=False, residual=False)
        self.mlp = MLP(dim, width)
        self.modulation = nn.Linear(dim, 6 * dim)


class Final(nn.Module):
    """The last norm's modulation and the projection to an image."""

    def __init__(self, dim, channels, patch):
        super().__init__()
        self.modulation, self.unpatch = nn.Linear(dim, 2 * dim), Unpatch(dim, channels, patch)


class DiT(Model):
    """The noise of a latent image, and where its variance lies between two bounds: a transformer on patches, with adaLN-Zero.

    Shapes   x (B, channels, *size); t (B,), any real dtype; y (B,) int64 in [0, classes] -> (B, channels, *size), or (B, 2 channels, *size)
             with variance=True: noise, then the variances' place
    Options  size: of the image, an int or (h, w); mlp_ratio: width of the MLP over dim. dropout: of labels in training, as in
             `nn.LabelEmbedding`; the label `classes` is the null label where it is above 0
    Units    t in steps of the diffusion process, 0 to 999
    Raises   ValueError for an image of another size, for guidance without a null label
    Source   Peebles & Xie 2023, section 3.2
    """

    _SIZES = (("S", 12, 384, 6), ("B", 12, 768, 12), ("L", 24, 1024, 16), ("XL", 28, 1152, 16))
    CONFIGS: ClassVar = {f"DiT-{name}/{patch}": dict(depth=depth, dim=dim, heads=heads, patch=patch)
               for name, depth, dim, heads in _SIZES for patch in (2, 4, 8)}

    def __init__(self, *, depth, dim, heads, patch, size=32, channels=4, mlp_ratio=4.0, classes=1000, dropout=0.1, variance=True):
        super().__init__()
        self.size = (size, size) if isinstance(size, int) else tuple(size)
        if any(n % patch for n in self.size):
            fail("DiT", f"patch wants a divisor of size = {self.size}, got {patch}")
        self.grid = tuple(n // patch for n in self.size)
        self.x_embedder = PatchEmbed(channels, dim, patch, position=position_table(self.grid, dim))
        self.t_embedder = TimestepEmbedding(256, dim)
        self.y_embedder = LabelEmbedding(classes, dim, dropout)
        self.blocks = nn.ModuleList(Block(dim, heads, int(dim * mlp_ratio)) for _ in range(depth))
        self.final = Final(dim, channels * (1 + variance), patch)
        self._initialise()

    def _initialise(self):
        """Every block begins as the identity, and the model as 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        for weight in (self.y_embedder.embedding_table.weight, self.t_embedder.mlp[0].weight, self.t_embedder.mlp[2].weight):
            nn.init.normal_(weight, std=0.02)
        for weight in (*(block.modulation.weight for block in self.blocks), self.final.modulation.weight, self.final.unpatch.linear.weight):
            nn.init.zeros_(weight)

    def forward(self, x, t, y, drop=None):
        """drop (B,) bool: the labels to replace by the null label; drawn in training unless given."""
        if tuple(x.shape[2:]) != self.size:
            fail("DiT", f"x wants the size {self.size}, got {tuple(x.shape[2:])}")
        per_sample("DiT", x, t=t, y=y)
        condition = F.silu(self.t_embedder(t) + self.y_embedder(y, drop))
        shift, scale, *rest = self.blocks[0].modulation(condition).chunk(6, -1)
        x = self.x_embedder(x)
        h = layer_norm_modulate(x, shift, scale, eps=EPS)
        for block, after in zip(self.blocks, (*self.blocks[1:], self.final), strict=True):
            gate, mlp_shift, mlp_scale, mlp_gate = rest
            shift, scale, *rest = after.modulation(condition).chunk(6 if after is not self.final else 2, -1)
            x, h = gate_residual_norm_modulate(x, block.attn(h), gate, mlp_shift, mlp_scale, eps=EPS)
            x, h = gate_residual_norm_modulate(x, block.mlp(h), mlp_gate, shift, scale, eps=EPS)
        return self.final.unpatch(h, self.grid)

    def guided(self, x, t, y, scale, channels=3):
        """forward with the noise of the first `channels` channels guided: null + scale (labelled - null).

        The published models guide 3 of their 4 channels.
        """
        null = torch.full_like(y, self.y_embedder.null())
        labelled, plain = self(torch.cat((x, x)), torch.cat((t, t)), torch.cat((y, null))).chunk(2)
        guided = plain[:, :channels] + scale * (labelled[:, :channels] - plain[:, :channels])
        return torch.cat((guided, labelled[:, channels:]), 1)

    def load_dit(self, state):
        """Loads a state dict of facebookresearch/DiT."""
        self.load_state_dict(renamed(state))

    def load_diffusers(self, state):
        """Loads a state dict of diffusers' DiTTransformer2DModel, whose blocks have an embedder of time and label each.

        The results are the published DiT's: diffusers divides the exponents of the times' frequencies by 127, not by 128, and has an eps of
        1e-5 in its second norms.
        Raises   ValueError where two blocks' embedders differ
        """
        state, embedders = dict(state), {}
        for name in list(state):
            block, _, leaf = name.partition(".norm1.emb.")
            if leaf:
                value = state.pop(name)
                if not torch.equal(embedders.setdefault(leaf, value), value):
                    fail("DiT", f"load_diffusers: state wants one {leaf} in all blocks, got another in {block}")
            elif ".to_q." in name:
                three = [state.pop(name.replace(".to_q.", f".to_{x}.")) for x in "qkv"]
                state[name.replace("to_q", "qkv")] = torch.cat(three)
        self.load_state_dict(renamed(state | embedders, DIFFUSERS) | {"x_embedder.pos_embed": self.x_embedder.pos_embed})


def renamed(state, names=None):
    """A published state dict, or gradients under its names, under the names here; facebookresearch/DiT's unless `names` says otherwise."""
    made = {}
    for name, value in state.items():
        for theirs, ours in (names or NAMES).items():
            name = name.replace(theirs, ours)
        made[name] = value
    return made


# facebookresearch/DiT's names and those here, replaced in this order.
NAMES = {"pos_embed": "x_embedder.pos_embed", "attn.proj": "attn.out", "adaLN_modulation.1": "modulation",
         "final_layer.linear": "final.unpatch.linear", "final_layer": "final"}
# diffusers' likewise; a block's three projections are one here, and the blocks' embedders are one.
DIFFUSERS = {"pos_embed.proj": "x_embedder.proj", "timestep_embedder.linear_1": "t_embedder.mlp.0",
             "timestep_embedder.linear_2": "t_embedder.mlp.2", "class_embedder": "y_embedder", "transformer_blocks": "blocks",
             "norm1.linear": "modulation", "attn1.to_out.0": "attn.out", "attn1.": "attn.", "ff.net.0.proj": "mlp.fc1",
             "ff.net.2": "mlp.fc2", "proj_out_1": "final.modulation", "proj_out_2": "final.unpatch.linear"}
