"""denoising-diffusion-pytorch: blocks of its U-Nets, full attention."""

import torch
import torch.nn.functional as F

from ...ops import attention
from .rule import Rule, dropout_note, watched

_PACKAGE = "denoising_diffusion_pytorch"


def _unit(x):
    """x / |x| over the channels."""
    # A sum of squares over a strided axis takes a tenth of the time of torch's norm. Bounded first, it has no infinite slope at 0.
    squares = (x if x.dtype == torch.float64 else x.float()).square().sum(1, keepdim=True)
    return x * squares.clamp(min=1e-24).rsqrt().to(x.dtype)


def _norm(plain):
    def forward(self, x):
        return _unit(x) * (self.g * x.shape[1] ** 0.5)

    return forward


def _block(plain):
    def forward(self, x, scale_shift=None):
        if watched(self.norm, self.act):
            return plain(self, x, scale_shift)
        y = self.proj(x)
        y, gain = _unit(y), self.norm.g * y.shape[1] ** 0.5
        y = y * gain if scale_shift is None else torch.addcmul(scale_shift[1], y, (scale_shift[0] + 1) * gain)
        y = F.silu(y, inplace=not y.requires_grad)
        return self.dropout(y) if hasattr(self, "dropout") else y

    return forward


def _no_block(m):
    norm = f"{type(m).__module__}.RMSNorm"
    if f"{type(m.norm).__module__}.{type(m.norm).__qualname__}" != norm or type(m.act) is not torch.nn.SiLU:
        return f"its norm and activation are no {norm} and SiLU"
    return None


def _attend(plain):
    def forward(self, q, k, v):
        if self.flash or (self.training and self.dropout > 0) or q.device.type not in ("cpu", "cuda"):
            return plain(self, q, k, v)
        return attention(q, k, v, scale=self.scale)

    return forward


_LINEAR = "linear attention: it has no softmax over scores of queries and keys"

_PARTS = ("denoising_diffusion_pytorch", "denoising_diffusion_pytorch_1d", "classifier_free_guidance")

RULES = (
    *(rule for part in _PARTS for rule in (
        Rule(f"{_PACKAGE}.{part}", "Block", _block, refuse=_no_block, inputs=frozenset(("x", "scale_shift")),
             options=frozenset(("dim", "dim_out", "dropout"))),
        Rule(f"{_PACKAGE}.{part}", "RMSNorm", _norm, inputs=frozenset("x"), options=frozenset(("dim",))),
        Rule(f"{_PACKAGE}.{part}", "LinearAttention", leave=_LINEAR))),
    Rule(f"{_PACKAGE}.attend", "Attend", _attend, note=lambda m: dropout_note(m.attn_dropout), inputs=frozenset("qkv"),
         options=frozenset(("dropout", "flash", "scale")),
         refuse=lambda m: "flash: it calls scaled_dot_product_attention" if m.flash else None),
)
