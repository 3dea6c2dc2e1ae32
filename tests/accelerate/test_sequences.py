"""The rules of perceiver-ar-pytorch and hourglass-transformer-pytorch against their own modules and models."""

import copy

import pytest
import torch
from test_rules import compared

import fastdiff
from fastdiff.accelerate.rules import hourglass_transformer_pytorch, perceiver_ar_pytorch


@pytest.fixture
def calls(monkeypatch):
    """The sizes (M, N) of the calls of attention that the rules make."""
    made = []
    for rules in (hourglass_transformer_pytorch, perceiver_ar_pytorch):
        op = rules.attention
        monkeypatch.setattr(rules, "attention", lambda q, k, v, op=op, **o: made.append((q.shape[2], k.shape[2])) or op(q, k, v, **o))
    return made


@pytest.fixture
def reader(calls):
    return pytest.importorskip("perceiver_ar_pytorch.perceiver_ar_pytorch", reason="perceiver-ar-pytorch is not installed")


@pytest.fixture
def hourglass(calls):
    return pytest.importorskip("hourglass_transformer_pytorch.hourglass_transformer_pytorch",
                               reason="hourglass-transformer-pytorch is not installed")


class Tokens(torch.nn.Module):
    """A model of tokens, given as the first input, with another one before its layers that wants gradients: an addend of embeddings."""

    def __init__(self, model, tokens):
        super().__init__()
        self.model, self.tokens = model, tokens

    def forward(self, x, **options):
        handle = self.model.token_emb.register_forward_hook(lambda m, inputs, out: out + x)
        try:
            return self.model(self.tokens, **options)
        finally:
            handle.remove()


def reads(reader, **options):
    options = dict(num_tokens=11, dim=12, depth=2, max_seq_len=10, cross_attn_seq_len=6, dim_head=36, heads=3) | options
    return reader.PerceiverAR(**options).eval()


def lines(hourglass, **options):
    options = dict(num_tokens=11, dim=12, depth=(1, (1, 1, 1), 1), max_seq_len=12, shorten_factor=(3, 2), dim_head=4, heads=3) | options
    return hourglass.HourglassTransformerLM(**options).eval()


MODELS = {
    "reader": (reads, {}, [(4, 10), (4, 4), (4, 4)], False),
    "reader, two reads, masked": (reads, dict(perceive_depth=2, depth=1), [(4, 10)] * 2 + [(4, 4)], True),
    "hourglass": (lines, {}, [(12, 12), (1, 3), (4, 4), (1, 2), (2, 2), (4, 4), (12, 12)], False),
    "hourglass, masked": (lines, dict(causal=False), [(12, 12), (1, 3), (4, 4), (1, 2), (2, 2), (4, 4), (12, 12)], True),
    "hourglass, causal, masked": (lines, dict(updown_sample_type="linear", depth=(1, 1, 1), shorten_factor=3),
                                  [(12, 12), (1, 3), (4, 4), (12, 12)], True),
}


@pytest.mark.parametrize("name", MODELS)
def test_models(request, name, calls):
    build, options, sizes, masked = MODELS[name]
    model = build(request.getfixturevalue("reader" if build is reads else "hourglass"), **options)
    tokens = torch.randint(11, (2, 10 if build is reads else 12))
    keys, kinds = list(model.state_dict()), [type(m) for m in model.modules()]
    given = {}
    if masked:
        seen = torch.rand(2, 6 if build is reads else 12) < 0.6
        seen[0, :4] = False  # the first queries see no key, and one token of a reader's sample stays
        given = {"prefix_mask" if build is reads else "mask": seen}
    plain = model(tokens, **given)
    compared(Tokens(copy.deepcopy(model), tokens), (torch.randn(2, tokens.shape[1], 12),), **given)
    assert calls == sizes
    report = fastdiff.accelerate(model, show=False)
    assert len(report.replaced) == len(sizes) + {"hourglass": 2, "hourglass, masked": 2, "hourglass, causal, masked": 1}.get(name, 0)
    assert list(model.state_dict()) == keys
    fastdiff.restore(model)
    assert [type(m) for m in model.modules()] == kinds and torch.equal(model(tokens, **given), plain)


SMALL = {"reader": (reads, dict(depth=1)), "hourglass": (lines, dict(depth=(1, 1, 1), shorten_factor=3))}


@pytest.mark.parametrize("name", SMALL)
def test_compiles_whole_and_under_autocast(request, name, calls):
    build, options = SMALL[name]
    model, tokens = build(request.getfixturevalue(name), **options), torch.randint(11, (2, 9))
    plain = model(tokens)
    fastdiff.accelerate(model, show=False)
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(tokens), plain, rtol=1e-4, atol=1e-5)
    made = len(calls)
    with torch.autocast("cpu", torch.bfloat16):  # perceiver-ar-pytorch's own masks overflow there
        fast = model(tokens)
    assert fast.dtype == torch.bfloat16 and len(calls) > made
    torch.testing.assert_close(fast.float(), plain, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("build", [reads, lines])
def test_half(request, build, calls):
    model = build(request.getfixturevalue("reader" if build is reads else "hourglass"))
    tokens = torch.randint(11, (2, 10 if build is reads else 12))
    exact = copy.deepcopy(model).double()(tokens)
    plain = model.bfloat16()(tokens)
    fastdiff.accelerate(model, show=False)
    fast = model(tokens)
    assert calls and fast.dtype == torch.bfloat16
    assert (fast - exact).abs().max() <= 2 * (plain - exact).abs().max() + 2 ** -8 * exact.abs().max()


def test_a_mask_beyond_the_context_is_the_originals(reader, calls):
    layer = reader.CausalPrefixAttention(dim=8, dim_head=4, heads=2)
    inputs = torch.randn(2, 3, 8), torch.randn(2, 5, 8), torch.rand(2, 8) < 0.5
    plain = layer(*inputs)
    fastdiff.accelerate(layer, show=False)
    assert torch.equal(layer(*inputs), plain) and not calls


@pytest.mark.parametrize("dropouts", [dict(dropout=0.5), dict(cross_attn_dropout=0.5)], ids=str)
def test_dropout(reader, calls, dropouts):
    layer = reader.CausalPrefixAttention(dim=32, dim_head=32, heads=2, **dropouts)
    x, context, angles = torch.randn(2, 3, 32), torch.randn(2, 6, 32), torch.randn(9, 32)

    def runs():
        torch.manual_seed(1)
        return layer.train()(x, context, rotary_pos_emb=angles), layer.eval()(x, context, rotary_pos_emb=angles)

    plain = runs()
    assert "dropout" in fastdiff.accelerate(layer, show=False).replaced[0].note
    fast = runs()
    assert torch.equal(fast[0], plain[0]) and calls == [(3, 9)]
    torch.testing.assert_close(fast[1], plain[1])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("M", "N"), [(5, 3), (3, 5), (4, 1)])
def test_queries_without_a_key_weigh_all_alike(hourglass, M, N, masked):
    layer = hourglass.Attention(12, heads=3, dim_head=4, causal=True)
    compared(layer, (torch.randn(2, M, 12), torch.randn(2, N, 12)), **(dict(mask=torch.rand(2, N) < 0.4) if masked else {}))


def test_one_key_has_all_gradients(hourglass, calls):
    """Those of the queries are 0, and there, as a weight decay wants them; a watched layer runs."""
    layer, x, source = hourglass.Attention(12, heads=3, dim_head=4), torch.randn(2, 5, 12, requires_grad=True), torch.randn(2, 1, 12)
    fastdiff.accelerate(layer, show=False)
    layer(x, source).square().sum().backward()
    assert not calls and not x.grad.any() and not layer.to_q.weight.grad.any() and layer.to_kv.weight.grad[12:].all()
    seen = []
    layer.to_q.register_forward_hook(lambda *_: seen.append(1))
    layer(x, source)
    assert seen and calls == [(5, 1)]
