"""Norms with what follows them, found by tracing in classes that no rule names."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from test_rules import compared
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastdiff
from fastdiff.accelerate.rules import rule, traced


class Residual(nn.Module):
    """The block of a U-Net, as many write it."""

    def __init__(self, channels=8, dropout=0.0):
        super().__init__()
        self.norm1, self.act, self.conv1 = nn.GroupNorm(4, channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(4, channels, eps=1e-3), nn.Conv2d(channels, channels, 3, padding=1)
        self.emb, self.dropout = nn.Linear(5, 2 * channels), dropout

    def forward(self, x, emb=None):
        h = self.norm2(self.conv1(self.act(self.norm1(x))))
        if emb is not None:
            scale, shift = self.emb(F.silu(emb))[:, :, None, None].chunk(2, dim=1)
            h = h * (1 + scale) + shift
        return x + self.conv2(F.dropout(F.silu(h), self.dropout, self.training))


def modulate(x, shift, scale):
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class Block(nn.Module):
    """The MLP half of a DiT block."""

    def __init__(self, width=12):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp, self.ada = nn.Linear(width, width), nn.Linear(5, 3 * width)

    def forward(self, x, c):
        shift, scale, gate = self.ada(c).chunk(3, dim=1)
        return x + gate.unsqueeze(1) * self.mlp(modulate(self.norm(x), shift, scale))


@pytest.fixture
def fused(monkeypatch):
    calls = []
    for name in ("group_norm_modulate", "layer_norm_modulate"):
        op = getattr(fastdiff.ops, name)
        monkeypatch.setattr(traced, name, lambda *a, name=name, op=op, **o: calls.append(name) or op(*a, **o))
    return calls


CASES = {
    "residual": (Residual, ((2, 8, 6, 5),), ["group_norm_modulate"] * 2),
    "residual with emb": (Residual, ((2, 8, 6, 5), (2, 5)), ["group_norm_modulate"] * 2),
    "sequential": (lambda: nn.Sequential(nn.GroupNorm(2, 6), nn.SiLU(), nn.Conv1d(6, 4, 1)), ((2, 6, 9),), ["group_norm_modulate"]),
    "block": (Block, ((2, 7, 12), (2, 5)), ["layer_norm_modulate"]),
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(fused, name):
    make, shapes, expected = CASES[name]
    module = make()
    compared(module, [torch.randn(s) for s in shapes])
    assert fused[-len(expected):] == expected


FORMS = {
    "(1 + s) * n + b": lambda n, s, b: (1 + s) * n + b, "n * (s + 1) + b": lambda n, s, b: n * (s + 1) + b,
    "b + n.mul(1 + s)": lambda n, s, b: b + n.mul(1 + s), "torch.add(n * (1.0 + s), b)": lambda n, s, b: torch.add(n * (1.0 + s), b),
    "n * (1 + s)": lambda n, s, b: n * (1 + s)}
OTHERS = {"n * s + b": lambda n, s, b: n * s + b, "n * (2 + s) + b": lambda n, s, b: n * (2 + s) + b,
          "n used twice": lambda n, s, b: n * (1 + s) + n, "(1 + n) * s": lambda n, s, b: (1 + n) * s}


class Form(nn.Module):
    def __init__(self, form, norm):
        super().__init__()
        self.norm, self.form = norm, form

    def forward(self, x, s, b):
        return self.form(self.norm(x), s, b)


@pytest.mark.parametrize("form", [*FORMS, *OTHERS])
def test_forms(fused, form):
    module, inputs = Form((FORMS | OTHERS)[form], nn.LayerNorm(8)), (torch.randn(2, 3, 8), torch.randn(2, 1, 8), torch.randn(2, 1, 8))
    plain = module(*inputs)
    report = fastdiff.accelerate(module, show=False)
    torch.testing.assert_close(module(*inputs), plain)
    assert len(report.replaced) == len(fused) == (form in FORMS)


@pytest.mark.parametrize("shapes", [((2, 3, 8),) * 3, ((2, 3, 8), (8,), (2, 1, 8)), ((3, 8), (3, 8), (3, 8)),
                                    ((2, 3, 8), (2, 3, 1), (2, 3, 1))], ids=str)
def test_other_broadcasts(shapes):
    """What the op takes it computes, what else broadcasts is computed as written."""
    module, inputs = Form(FORMS["n * (s + 1) + b"], nn.LayerNorm(8)), [torch.randn(s) for s in shapes]
    plain = module(*inputs)
    assert fastdiff.accelerate(module, show=False).replaced
    torch.testing.assert_close(module(*inputs), plain)


def test_changed_attributes_and_modules_run_the_original(fused):
    module, x = nn.Sequential(nn.GroupNorm(2, 6), nn.SiLU()), torch.randn(2, 6, 9)
    fastdiff.accelerate(module, show=False)
    module.append(nn.Tanh())
    assert module(x).abs().max() <= 1 and not fused
    block = Residual(dropout=0.0)
    fastdiff.accelerate(block, show=False)
    block.dropout = 1.0
    block.train()
    x = torch.randn(2, 8, 6, 5)
    torch.testing.assert_close(block(x), x + block.conv2.bias[:, None, None])


def test_hooks_of_what_is_fused_are_called():
    block, x, heard = Residual(), torch.randn(2, 8, 6, 5), []
    plain = block(x)
    fastdiff.accelerate(block, show=False)
    for m in (block.norm1, block.act, block.norm2, block.conv1):
        m.register_forward_hook(lambda m, *_: heard.append(type(m).__name__))
    torch.testing.assert_close(block(x), plain)
    assert heard == ["GroupNorm", "SiLU", "Conv2d", "GroupNorm"]


class Asks(nn.Sequential):
    def forward(self, x):
        return super().forward(x) if isinstance(x, torch.Tensor) else x


class Branches(nn.Sequential):
    def forward(self, x):
        return self[1](self[0](x)) if x.sum() > 0 else x


class Stores(nn.Sequential):
    def forward(self, x):
        self.last = self[0](x)
        return self[1](self.last)


class Makes(nn.Sequential):
    def forward(self, x):
        return super().forward(x) + torch.arange(9)


@pytest.mark.parametrize(("kind", "why"), [
    (Makes, "makes a tensor"), (Asks, "asks isinstance"), (Branches, "control flow"), (Stores, "changes attributes")])
def test_what_cannot_be_traced(kind, why):
    module, x = kind(nn.GroupNorm(2, 6), nn.SiLU()).train(), torch.randn(2, 6, 9)
    plain, attributes = module(x), set(vars(module))
    report = fastdiff.accelerate(module, show=False)
    assert set(vars(module)) == attributes
    assert not report.replaced and "cannot be traced" in report.kept[0].reason and why in report.kept[0].reason
    assert type(module) is kind and torch.equal(module(x), plain)


def test_in_training_each_mode_has_its_dropout(fused):
    block, x = Residual(dropout=0.5), torch.randn(2, 8, 6, 5)

    def runs():
        torch.manual_seed(1)
        return [block.train(mode)(x) for mode in (True, False)]

    plain = runs()
    fastdiff.accelerate(block, show=False)
    torch.testing.assert_close(runs(), plain)
    assert len(fused) == 4


def test_copies_pickles_compiles_checkpoints(tmp_path):
    block, x, emb = Residual(), torch.randn(2, 8, 6, 5, requires_grad=True), torch.randn(2, 5)
    plain = block(x, emb)
    fastdiff.accelerate(block, show=False)
    fast = block(x, emb=emb)
    torch.testing.assert_close(fast, plain)
    torch.save(block, tmp_path / "block.pt")
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block)), torch.load(tmp_path / "block.pt", weights_only=False)):
        assert type(other) is type(block) and torch.equal(other(x, emb), fast)
        assert type(fastdiff.restore(other)) is Residual and torch.equal(other(x, emb), plain)
    torch.testing.assert_close(torch.compile(block, backend="eager", fullgraph=True)(x, emb), plain)
    (kept,) = torch.autograd.grad(checkpoint(block, x, emb, use_reentrant=False).sum(), x)
    torch.testing.assert_close(kept, torch.autograd.grad(fast.sum(), x)[0])
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(block(x, emb), fastdiff.restore(copy.deepcopy(block))(x, emb), rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("mask", [None, "key", "bool", "float", "per head", "both", "causal"])
@pytest.mark.parametrize("options", [{}, {"batch_first": True, "bias": False}, {"kdim": 6, "vdim": 10}], ids=str)
def test_multihead_attention(options, mask):
    attend = nn.MultiheadAttention(12, 3, **options)
    q, k, v = torch.randn(2, 5, 12), torch.randn(2, 5 if mask == "causal" else 7, options.get("kdim", 12)), None
    v = torch.randn(2, k.shape[1], options.get("vdim", 12))
    if not options.get("batch_first"):
        q, k, v = (t.transpose(0, 1) for t in (q, k, v))
    seen = torch.rand(2, 7) < 0.3
    seen[:, 0] = False
    hidden = torch.rand(5, 7) < 0.3
    hidden[:, 0] = False
    given = {None: {}, "key": dict(key_padding_mask=seen), "bool": dict(attn_mask=hidden), "float": dict(attn_mask=torch.randn(5, 7)),
             "per head": dict(attn_mask=torch.randn(6, 5, 7)), "both": dict(attn_mask=hidden, key_padding_mask=seen),
             "causal": dict(attn_mask=nn.Transformer.generate_square_subsequent_mask(5), is_causal=True)}[mask]
    with torch.no_grad():
        for p in attend.parameters():
            p.normal_(0, 0.4)
    compared(Plain(attend, given), (q, k, v))


class Plain(nn.Module):
    def __init__(self, attend, given):
        super().__init__()
        self.attend, self.given = attend, given

    def forward(self, *inputs):
        fit = lambda x: x.to(inputs[0].dtype) if x.is_floating_point() else x
        return self.attend(*inputs, need_weights=False, **{n: x if isinstance(x, bool) else fit(x) for n, x in self.given.items()})[0]


def test_multihead_attention_that_stays_with_the_original(monkeypatch):
    attend, x = nn.MultiheadAttention(12, 3, dropout=0.5, batch_first=True), torch.randn(2, 5, 12)
    plain = attend.eval()(x, x, x)
    report = fastdiff.accelerate(attend, show=False)
    assert "dropout 0.5" in report.replaced[0].note
    assert all(map(torch.equal, attend(x, x, x), plain))
    assert attend(x[0], x[0], x[0], need_weights=False)[0].shape == (5, 12)
    layer = nn.TransformerEncoderLayer(12, 3, 24, batch_first=True, dropout=0.0)
    plain = layer(x)
    assert [row.name for row in fastdiff.accelerate(layer, show=False).replaced] == ["self_attn"]
    torch.testing.assert_close(layer(x), plain)
    report = fastdiff.accelerate(nn.MultiheadAttention(12, 3, add_bias_kv=True), show=False)
    assert not report.replaced and "keys of its own" in report.kept[0].reason


@pytest.mark.parametrize(("name", "kinds"), [
    ("residual with emb", ("group norm", "modulated group norm")), ("block", ("layer norm",))])
def test_small_tensors_and_gradients_are_left_to_pytorch(fused, monkeypatch, name, kinds):
    """Each op from its own size on, and from a larger one where gradients are wanted."""
    make, shapes, expected = CASES[name]
    module, inputs = make(), [torch.randn(s) for s in shapes]
    fastdiff.accelerate(module, show=False)
    size = inputs[0].numel()
    for limits, calls in (((0, size + 1), 0), ((0, size), len(expected))):
        monkeypatch.setattr(rule, "FROM", dict.fromkeys(kinds, limits))
        fused.clear()
        module(inputs[0].requires_grad_(), *inputs[1:])
        assert len(fused) == calls
        with torch.no_grad():
            module(*inputs)
        assert len(fused) == calls + len(expected)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_memory_format(fused, memory_format):
    """Outputs and gradients lie as PyTorch's do."""
    module, x = nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU()), torch.randn(2, 8, 6, 5).to(memory_format=memory_format).requires_grad_()

    def both():
        y = module(x)
        return y, torch.autograd.grad((y * y).sum(), x)[0]

    plain = both()
    fastdiff.accelerate(module, show=False)
    for ours, theirs in zip(both(), plain, strict=True):
        torch.testing.assert_close(ours, theirs)
        assert ours.stride() == theirs.stride() == x.stride()
    assert fused == ["group_norm_modulate"]
