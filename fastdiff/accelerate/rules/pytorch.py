"""PyTorch's own layers."""

from .rule import Rule

RULES = (
    Rule("torch.nn.modules.activation", "MultiheadAttention", leave="calls scaled_dot_product_attention: run it in fastdiff.sdpa()"),
)
