"""A linear layer."""

import torch
import torch.nn.functional as F

from ..ops import linear

# Below, and on a GPU, torch's product: ours packs the weight first, which pays from about 256 rows on (Zen 4).
ROWS = 256


class Linear(torch.nn.Linear):
    """x W^T + b, as torch's, by `fastdiff.ops.linear` for many rows on a CPU.

    Shapes   x (..., in_features) -> (..., out_features)
    State    as torch.nn.Linear
    """

    def forward(self, x):
        if x.device.type != "cpu" or x.numel() < ROWS * self.in_features:
            return F.linear(x, self.weight, self.bias)
        return linear(x, self.weight, self.bias)
