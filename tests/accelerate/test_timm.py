"""The rules of timm against its own modules."""

import importlib

import pytest
import torch
from test_rules import compared

import fastdiff
from fastdiff.accelerate.rules import rule
from fastdiff.accelerate.rules import timm as rules


@pytest.fixture
def calls(monkeypatch):
    """The calls of attention that the rules make; few scores are worth one here."""
    made, op = [], rules.attention
    monkeypatch.setattr(rules, "attention", lambda *arguments, **options: made.append(options) or op(*arguments, **options))
    monkeypatch.setattr(rule, "SCORES", dict.fromkeys((False, True), 0))
    return made


@pytest.fixture
def timm(timm_patch_embed, calls):
    return importlib.import_module


@pytest.mark.parametrize("options", [{}, dict(qkv_bias=True, gated=True, attn_head_dim=4),
                                     dict(qk_norm=True, scale_norm=True, norm_layer=torch.nn.LayerNorm)], ids=str)
@pytest.mark.parametrize("mask", [None, "bool", "float"])
def test_attention(timm, calls, options, mask):
    attention = timm("timm.layers.attention").Attention(12, 3, **options)
    given = {None: {}, "bool": dict(attn_mask=torch.eye(5, dtype=torch.bool) | (torch.rand(2, 1, 5, 5) < 0.5)),
             "float": dict(attn_mask=torch.randn(5, 5))}[mask]
    compared(attention, (torch.randn(2, 5, 12),), **given)
    assert len(calls) == 1


def test_vision_transformer(timm, calls):
    build = timm("timm.models.vision_transformer").VisionTransformer
    model = build(img_size=8, patch_size=4, embed_dim=12, depth=2, num_heads=3, num_classes=5, init_values=0.5)
    keys, x = list(model.state_dict()), torch.randn(2, 3, 8, 8)
    plain = model.eval()(x)
    compared(model, (x,))
    assert len(calls) == 2
    report = fastdiff.accelerate(model, show=False)
    assert [row.kind.rpartition(".")[2] for row in report.replaced] == ["PatchEmbed", "Attention", "Attention"]
    assert {"one pass over its input already", "PyTorch's layer norm is one pass already"} <= {row.reason for row in report.kept}
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), plain)
    assert torch.equal(fastdiff.restore(model)(x), plain)


def test_causal_and_dropout(timm, calls):
    attention = timm("timm.layers.attention").Attention(12, 3, attn_drop=0.5)
    x = torch.randn(2, 5, 12)

    def runs():
        torch.manual_seed(1)
        return attention.train()(x), attention.eval()(x, is_causal=True)

    plain = runs()
    assert "dropout 0.5" in fastdiff.accelerate(attention, show=False).replaced[0].note
    fast = runs()
    assert torch.equal(fast[0], plain[0]) and len(calls) == 1
    torch.testing.assert_close(fast[1], plain[1])
