"""The perceptron of a transformer layer, and its gated first half."""

import torch
import torch.nn.functional as F
from torch import nn

from ..ops import geglu
from . import foreign
from .linear import Linear

ACTIVATIONS = {"gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "squared_relu": lambda x: F.relu(x).square(),
               "geglu": geglu}
# Rows whose hidden units stay in a core's cache between the two products, where nothing need be kept for backward.
PART = 512


class MLP(nn.Module):
    """x + W_2 f(W_1 LN(x) + b_1) + b_2.

    Shapes   x (..., dim) -> (..., dim)
    Options  hidden: width between the products; activation f: "gelu" (exact), "gelu_tanh", "squared_relu", "geglu" (value * gelu(gate));
             dropout: of the hidden units; residual: adds x
    State    norm: nn.LayerNorm; up, down: Linear, up with the rows of values and then of gates for "geglu"
    Raises   ValueError for an unknown activation
    Source   Vaswani et al. 2017, section 3.3, with the norm before; Shazeer 2020 ("geglu"); So et al. 2021 ("squared_relu")
    """

    def __init__(self, dim, hidden, *, activation="gelu", dropout=0.0, residual=True, eps=1e-5):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"MLP: activation wants one of {', '.join(map(repr, ACTIVATIONS))}, got {activation!r}")
        self.activation, self.dropout, self.residual = activation, dropout, residual
        self.norm = nn.LayerNorm(dim, eps)
        self.up, self.down = Linear(dim, 2 * hidden if activation == "geglu" else hidden), Linear(hidden, dim)

    def forward(self, x):
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or x.device.type != "cpu":
            return self._rows(x)
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        rows = x.reshape(-1, x.shape[-1])
        for part, out in zip(rows.split(PART), y.view(rows.shape).split(PART), strict=True):
            out.copy_(self._rows(part))
        return y

    def _rows(self, x):
        hidden = ACTIVATIONS[self.activation](self.up(self.norm(x)))
        y = self.down(F.dropout(hidden, self.dropout, self.training))
        return x + y if self.residual else y

    def extra_repr(self):
        return f"activation={self.activation}, dropout={self.dropout}, residual={self.residual}"


class GEGLU(nn.Module):
    """a gelu(b), [a | b] = W x + bias.

    Shapes   x (..., dim) -> (..., hidden)
    Options  approximate: of gelu, "none" (exact) or "tanh"
    State    proj: nn.Linear(dim, 2 * hidden), as diffusers' GEGLU
    Source   Shazeer 2020
    """

    def __init__(self, dim, hidden, *, bias=True, approximate="none"):
        super().__init__()
        self.approximate, self.proj = approximate, nn.Linear(dim, 2 * hidden, bias)

    def forward(self, x):
        return geglu(self.proj(x), approximate=self.approximate)

    def extra_repr(self):
        return f"approximate={self.approximate!r}"

    @classmethod
    def from_diffusers(cls, layer):
        """A `diffusers.models.activations.GEGLU`; weights are copied.

        Raises   ValueError for another layer
        """
        proj = foreign.of("from_diffusers: layer", layer, "diffusers.models.activations.GEGLU").proj
        return foreign.copied(cls(proj.in_features, proj.out_features // 2, bias=proj.bias is not None), proj=(proj.weight, proj.bias))
