"""The module against the published packages' layers, live, and by itself."""

import pytest
import torch

from fastdiff import nn

STATE = {f"{module}.{part}" for module in ("query", "key", "value", "out", "target_norm", "source_norm") for part in ("weight", "bias")}
SIZES = pytest.mark.parametrize(("dim", "source", "M", "N"), [(24, 16, 5, 33), (16, 24, 40, 6)], ids=["read", "write"])


def halves(of):
    """Gradients of key and value where one projection makes both."""
    return {"key.weight": lambda m: of(m).to_kv.weight.grad.chunk(2)[0], "value.weight": lambda m: of(m).to_kv.weight.grad.chunk(2)[1],
            "query.weight": lambda m: of(m).to_q.weight.grad, "out.weight": lambda m: of(m).to_out.weight.grad}


@SIZES
@pytest.mark.parametrize("norms", [(True, True), (True, False), (False, False)], ids=str)
def test_rin_pytorch(rin_attention, same, dim, source, M, N, norms):
    theirs = rin_attention(dim, dim_context=source, heads=3, dim_head=8, norm=norms[0], norm_context=norms[1])
    parameters = halves(lambda m: m)
    for name, there, here in (("target_norm", "norm", norms[0]), ("source_norm", "norm_context", norms[1])):
        if here:
            parameters[f"{name}.weight"] = lambda m, there=there: getattr(m, there).gamma.grad
    same(nn.CrossAttention.from_rin_pytorch, theirs, lambda m, x, context: m(x, context),
         (torch.randn(2, M, dim), torch.randn(2, N, source)), parameters)


def test_residual(rin_attention):
    theirs = rin_attention(16, dim_context=8, heads=2, dim_head=8, norm=True)
    x, context = torch.randn(2, 5, 16), torch.randn(2, 9, 8)
    torch.testing.assert_close(nn.CrossAttention.from_rin_pytorch(theirs, residual=True)(x, context), x + theirs(x, context))


@SIZES
@pytest.mark.parametrize("kind", ["perceiver_pytorch", "perceiver_io"])
def test_perceiver_pytorch(perceiver_pytorch, same, kind, dim, source, M, N):
    package = getattr(perceiver_pytorch, kind)
    theirs = package.PreNorm(dim, package.Attention(dim, source, heads=2, dim_head=8), context_dim=source)
    parameters = halves(lambda m: m.fn) | {
        "out.bias": lambda m: m.fn.to_out.bias.grad, "target_norm.weight": lambda m: m.norm.weight.grad,
        "target_norm.bias": lambda m: m.norm.bias.grad, "source_norm.weight": lambda m: m.norm_context.weight.grad,
        "source_norm.bias": lambda m: m.norm_context.bias.grad}
    same(nn.CrossAttention.from_perceiver_pytorch, theirs, lambda m, x, context: m(x, context=context),
         (torch.randn(2, M, dim), torch.randn(2, N, source)), parameters)


@SIZES
@pytest.mark.parametrize("residual", [False, True])
def test_transformers(transformers_perceiver, config, same, dim, source, M, N, residual):
    theirs = transformers_perceiver.PerceiverAttention(config, is_cross_attention=True, num_heads=2, q_dim=dim, kv_dim=source,
                                                       use_query_residual=residual).eval()
    names = {"query": "self.query", "key": "self.key", "value": "self.value", "out": "output.dense", "target_norm": "self.layernorm1",
             "source_norm": "self.layernorm2"}
    parameters = {f"{mine}.{part}": lambda m, path=f"{there}.{part}": m.get_parameter(path).grad
                  for mine, there in names.items() for part in ("weight", "bias")}
    same(nn.CrossAttention.from_transformers, theirs, lambda m, x, inputs: m(x, inputs=inputs)[0],
         (torch.randn(2, M, dim), torch.randn(2, N, source)), parameters)


def test_a_layer_of_transformers(transformers_perceiver, config):
    """Of a whole layer, the attention alone."""
    layer = transformers_perceiver.PerceiverLayer(config, is_cross_attention=True, q_dim=24, kv_dim=16, num_heads=2).eval()
    x, inputs = torch.randn(2, 5, 24), torch.randn(2, 9, 16)
    torch.testing.assert_close(nn.CrossAttention.from_transformers(layer)(x, inputs), layer.attention(x, inputs=inputs)[0])


def test_state():
    assert set(nn.CrossAttention(24, 16, heads=2).state_dict()) == STATE
    bare = nn.CrossAttention(24, 16, heads=2, bias=False, norm=False, source_norm=False)
    assert set(bare.state_dict()) == {name for name in STATE if name.endswith("weight") and "norm" not in name}
    assert "out.bias" in nn.CrossAttention(24, 16, heads=2, bias=False, out_bias=True).state_dict()
    assert nn.CrossAttention(24, 16, heads=2).query.weight.shape == (16, 24)


def test_key_lengths():
    made = nn.CrossAttention(8, 6, heads=2)
    target, source = torch.randn(2, 3, 8), torch.randn(2, 7, 6)
    out = made(target, source, key_lengths=torch.tensor([7, 4]))
    torch.testing.assert_close(out[1:], made(target[1:], source[1:, :4]))
    torch.testing.assert_close(out[:1], made(target[:1], source[:1]))


def test_refusals(rin_attention, perceiver_pytorch, transformers_perceiver, config):
    with pytest.raises(ValueError, match="heads wants a divisor of width = 16, got 3"):
        nn.CrossAttention(24, 16, heads=3)
    with pytest.raises(ValueError, match="heads wants a divisor of value_width = 9, got 2"):
        nn.CrossAttention(24, 16, heads=2, value_width=9)
    load = nn.CrossAttention.from_rin_pytorch
    for options, what in ((dict(time_cond_dim=8), "time conditioning"), (dict(qk_norm=True), "qk_norm"),
                          (dict(inverted_attention=True), "inverted attention")):
        with pytest.raises(ValueError, match=f"from_rin_pytorch: layer wants plain attention, got a layer with {what}"):
            load(rin_attention(16, **options))
    with pytest.raises(ValueError, match=r"wants a rin_pytorch\.rin_pytorch\.Attention, got a torch\.nn\.modules\.linear\.Linear"):
        load(torch.nn.Linear(2, 2))
    load, kind = nn.CrossAttention.from_perceiver_pytorch, perceiver_pytorch.perceiver_pytorch.Attention
    with pytest.raises(ValueError, match="queries_contribute_kv=True"):
        load(kind(16, queries_contribute_kv=True))
    with pytest.raises(ValueError, match=r"got dropout 0\.5 in training mode"):
        load(kind(16, dropout=0.5))
    assert load(kind(16, dropout=0.5).eval()).out.bias is not None
    with pytest.raises(ValueError, match="FeedForward"):
        load(perceiver_pytorch.perceiver_pytorch.PreNorm(8, perceiver_pytorch.perceiver_pytorch.FeedForward(8)))
    layer = transformers_perceiver.PerceiverAttention(config, is_cross_attention=True, q_dim=24, kv_dim=16)
    with pytest.raises(ValueError, match=r"from_transformers: layer wants a layer without dropout, or in eval mode, got dropout 0\.1"):
        nn.CrossAttention.from_transformers(layer)
    layer.eval().self.layernorm2.eps = 1e-12
    with pytest.raises(ValueError, match="norms of one eps"):
        nn.CrossAttention.from_transformers(layer)
