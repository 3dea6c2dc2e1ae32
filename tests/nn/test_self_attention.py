"""The module against the published packages' layers, live, and by itself."""

import pytest
import torch

from fastdiff import nn


def together(of):
    """Gradients of the one projection from those of the packages' two."""
    return {"qkv.weight": lambda m: torch.cat((of(m).to_q.weight.grad, of(m).to_kv.weight.grad)),
            "out.weight": lambda m: of(m).to_out.weight.grad}


@pytest.mark.parametrize("norm", [False, True])
def test_rin_pytorch(rin_attention, same, norm):
    theirs = rin_attention(24, heads=3, dim_head=16, norm=norm)
    parameters = together(lambda m: m)
    if norm:
        parameters["norm.weight"] = lambda m: m.norm.gamma.grad
    same(nn.SelfAttention.from_rin_pytorch, theirs, lambda m, x: m(x), (torch.randn(2, 13, 24),), parameters)


@pytest.mark.parametrize("kind", ["perceiver_pytorch", "perceiver_io"])
def test_perceiver_pytorch(perceiver_pytorch, same, kind):
    package = getattr(perceiver_pytorch, kind)
    theirs = package.PreNorm(24, package.Attention(24, heads=3, dim_head=8))
    parameters = together(lambda m: m.fn) | {"out.bias": lambda m: m.fn.to_out.bias.grad, "norm.weight": lambda m: m.norm.weight.grad,
                                             "norm.bias": lambda m: m.norm.bias.grad}
    same(nn.SelfAttention.from_perceiver_pytorch, theirs, lambda m, x: m(x), (torch.randn(2, 13, 24),), parameters)


@pytest.mark.parametrize("residual", [False, True])
def test_transformers(transformers_perceiver, config, same, residual):
    theirs = transformers_perceiver.PerceiverAttention(config, num_heads=3, q_dim=24, kv_dim=24, use_query_residual=residual).eval()
    parameters = {"out.weight": lambda m: m.output.dense.weight.grad, "out.bias": lambda m: m.output.dense.bias.grad,
                  "norm.weight": lambda m: m.self.layernorm1.weight.grad, "norm.bias": lambda m: m.self.layernorm1.bias.grad}
    for part in ("weight", "bias"):
        three = lambda m, part=part: torch.cat([m.self.get_parameter(f"{x}.{part}").grad for x in ("query", "key", "value")])
        parameters[f"qkv.{part}"] = three
    same(nn.SelfAttention.from_transformers, theirs, lambda m, x: m(x)[0], (torch.randn(2, 13, 24),), parameters)


def test_residual(rin_attention):
    theirs, x = rin_attention(16, heads=2, dim_head=8, norm=True), torch.randn(2, 5, 16)
    torch.testing.assert_close(nn.SelfAttention.from_rin_pytorch(theirs, residual=True)(x), x + theirs(x))


def test_causal():
    made, x = nn.SelfAttention(8, heads=2, causal=True), torch.randn(2, 7, 8)
    torch.testing.assert_close(made(x)[:, :4], made(x[:, :4]))


def test_key_lengths():
    made, x = nn.SelfAttention(8, heads=2), torch.randn(2, 7, 8)
    out = made(x, key_lengths=torch.tensor([7, 4]))
    torch.testing.assert_close(out[1:, :4], made(x[1:, :4]))
    torch.testing.assert_close(out[:1], made(x[:1]))


def test_state():
    made = nn.SelfAttention(24, heads=2, width=16)
    assert set(made.state_dict()) == {"qkv.weight", "qkv.bias", "out.weight", "out.bias", "norm.weight", "norm.bias"}
    assert made.qkv.weight.shape == (48, 24) and made.out.weight.shape == (24, 16)
    assert set(nn.SelfAttention(24, heads=2, bias=False, norm=False).state_dict()) == {"qkv.weight", "out.weight"}


def test_refusals(rin_attention, perceiver_pytorch, transformers_perceiver, config):
    with pytest.raises(ValueError, match="heads wants a divisor of width = 16, got 3"):
        nn.SelfAttention(16, heads=3)
    with pytest.raises(ValueError, match="from_rin_pytorch: layer wants a self-attention, got a cross-attention from 16 to 8 channels"):
        nn.SelfAttention.from_rin_pytorch(rin_attention(16, dim_context=8))
    package = perceiver_pytorch.perceiver_pytorch
    with pytest.raises(ValueError, match="wants a self-attention"):
        nn.SelfAttention.from_perceiver_pytorch(package.PreNorm(8, package.Attention(8, heads=1), context_dim=8))
    kind = transformers_perceiver.PerceiverAttention
    with pytest.raises(ValueError, match="wants values as wide as queries, 12, got 24"):
        nn.SelfAttention.from_transformers(kind(config, qk_channels=12, v_channels=24, num_heads=2, q_dim=24, kv_dim=24).eval())
    with pytest.raises(ValueError, match="wants results as wide as its input, 24, got 12"):
        nn.SelfAttention.from_transformers(kind(config, qk_channels=12, num_heads=2, q_dim=24, kv_dim=24, use_query_residual=False).eval())
