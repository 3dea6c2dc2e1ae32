"""Each rule's replacement against the class it replaces: values, gradients, masks, and the calls it hands back."""

import copy
from contextlib import contextmanager

import pytest
import torch

import fastdiff


def within(fast, plain, exact):
    """At most four times the plain float32 error, and a rounding: the largest error of a hundred gradients strays beyond twice by luck."""
    limit = 4 * (plain.double() - exact).abs().max() + 4e-7 * exact.abs().max()
    assert (fast.double() - exact).abs().max() <= limit


@contextmanager
def in_dtype(dtype):
    """RIN makes its positions in the default dtype."""
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def compared(module, arguments, **keywords):
    """Output and gradients of `module`, plain and accelerated, against its float64 self; returns the accelerated output."""
    exact, fast = copy.deepcopy(module).double(), copy.deepcopy(module)
    assert fastdiff.accelerate(fast, show=False).replaced
    results = []
    for m, dtype in ((exact, torch.float64), (module, torch.float32), (fast, torch.float32)):
        inputs = [a.to(dtype).requires_grad_() for a in arguments]
        options = {name: x.to(dtype) if x.is_floating_point() else x for name, x in keywords.items()}
        m.zero_grad()
        with in_dtype(dtype):
            out = m(*inputs, **options)
        (out * torch.linspace(-1, 1, out.numel(), dtype=dtype).view(out.shape)).sum().backward()
        results.append([out, *(a.grad for a in inputs if a.grad is not None), *(p.grad for p in m.parameters() if p.grad is not None)])
    for exact, plain, fast in zip(*results, strict=True):
        within(fast, plain, exact)
    return results[2][0]


def test_rin(rin):
    compared(*rin)


@pytest.mark.parametrize("options", [{"qk_norm": True}, {"latent_token_time_cond": True}, {"patches_self_attn": False}])
def test_rin_options(rin_pytorch, options):
    model = rin_pytorch.RIN(dim=32, image_size=16, patch_size=4, depth=1, latent_self_attn_depth=1, num_latents=8, heads=2,
                            dim_head=16, **options)
    compared(model, (torch.randn(2, 3, 16, 16), torch.rand(2)))


def test_perceiver(perceiver):
    compared(*perceiver)


def test_perceiver_io(perceiver_pytorch):
    model = perceiver_pytorch.PerceiverIO(depth=2, dim=16, queries_dim=20, logits_dim=5, num_latents=12, latent_dim=24, latent_heads=3,
                                          latent_dim_head=8, cross_dim_head=16)
    compared(model, (torch.randn(2, 30, 16),), mask=torch.rand(2, 30) < 0.6, queries=torch.randn(6, 20))


def masks(*shape):
    """Half of the keys hidden; and one sample without any key."""
    half = torch.rand(shape) < 0.5
    none = half.clone()
    none[0] = False
    return half, none


@pytest.mark.parametrize("which", [0, 1], ids=["half", "a sample without keys"])
@pytest.mark.parametrize("shape", [(2, 9), (2, 1, 5, 9), (2, 3, 5, 9), (1, 1, 5, 9)], ids=str)
def test_attend_mask(rin_pytorch, which, shape):
    attend = rin_pytorch.rin_pytorch.Attend()
    out = compared(attend, (torch.randn(2, 3, 5, 4), torch.randn(2, 3, 9, 4), torch.randn(2, 3, 9, 4)), mask=masks(*shape)[which])
    assert out.isfinite().all()


@pytest.mark.parametrize("which", [0, 1], ids=["half", "a sample without keys"])
@pytest.mark.parametrize("contribute", [False, True])
def test_perceiver_mask(perceiver_pytorch, which, contribute):
    kind = perceiver_pytorch.perceiver_pytorch.Attention
    attention = kind(12, 12, heads=3, dim_head=8, queries_contribute_kv=contribute)
    compared(attention, (torch.randn(2, 5, 12), torch.randn(2, 9, 12)), mask=masks(2, 9)[which])
    compared(attention, (torch.randn(2, 5, 12),))


def test_perceiver_mask_of_an_image(perceiver):
    compared(perceiver[0], perceiver[1], mask=torch.rand(2, 9, 10) < 0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half(perceiver, dtype):
    model, (x,) = perceiver
    exact = copy.deepcopy(model).double()(x.to(dtype).double())
    model.to(dtype)
    plain = model(x.to(dtype))
    fastdiff.accelerate(model, show=False)
    fast = model(x.to(dtype))
    assert fast.dtype == dtype
    assert (fast - exact).abs().max() <= 2 * (plain - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max()


def test_autocast(rin):
    model, inputs = rin
    with torch.autocast("cpu", torch.bfloat16):
        plain = model(*inputs)
        fastdiff.accelerate(model, show=False)
        fast = model(*inputs)
    assert fast.dtype == plain.dtype
    torch.testing.assert_close(fast, plain, rtol=0.1, atol=0.1)


def test_calls_that_stay_with_the_original(perceiver_pytorch):
    attention = perceiver_pytorch.perceiver_pytorch.Attention(12, heads=3, dim_head=8, dropout=0.5)
    x = torch.randn(2, 5, 12)

    def runs():
        torch.manual_seed(1)
        return attention.train()(x), attention.eval()(x, inverted_attention=True), attention.eval()(x)

    plain = runs()
    report = fastdiff.accelerate(attention, show=False)
    assert "dropout 0.5" in report.replaced[0].note
    fast = runs()
    assert torch.equal(plain[0], fast[0]) and torch.equal(plain[1], fast[1])
    torch.testing.assert_close(plain[2], fast[2])


def test_left_alone_and_why(rin_pytorch, perceiver_pytorch):
    attend = rin_pytorch.rin_pytorch.Attend
    subclass = type("Mine", (attend,), {})
    patched, other = attend(), attend(inverted_attention=True)
    patched.forward = lambda q, k, v: v
    model = torch.nn.ModuleList([attend(), subclass(), patched, other, torch.nn.MultiheadAttention(8, 2)])
    report = fastdiff.accelerate(model, show=False)
    assert [row.name for row in report.replaced] == ["0"]
    why = {row.name: row.reason for row in report.kept}
    assert "subclass of rin_pytorch.attend.Attend" in why["1"]
    assert "replaced on the instance" in why["2"]
    assert "inverted" in why["3"]
    assert "fastdiff.sdpa()" in why["4"]


def test_a_version_with_more_options_is_left_alone(perceiver_pytorch, monkeypatch):
    kind = perceiver_pytorch.perceiver_pytorch.Attention
    plain = kind.__init__
    monkeypatch.setattr(kind, "__init__", lambda self, query_dim, heads=8, softcap=None: plain(self, query_dim, heads=heads))
    report = fastdiff.accelerate(kind(8, heads=2), show=False)
    assert not report.replaced and "softcap" in report.kept[0].reason


def test_reads_heads_in_place(perceiver_pytorch, monkeypatch):
    from fastdiff.accelerate import rules

    seen = []
    monkeypatch.setattr(rules, "attention", lambda q, k, v, **options: seen.append((q, k, v)) or q)
    kind = perceiver_pytorch.perceiver_pytorch.Attention
    attention = kind(12, 10, heads=3, dim_head=8)
    fastdiff.accelerate(attention, show=False)
    attention(torch.randn(2, 5, 12), torch.randn(2, 9, 10))
    (q, k, v), = seen
    assert q.stride() == (120, 8, 24, 1)
    assert k.stride() == v.stride() == (9 * 48, 8, 48, 1)
    assert k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()


def test_compiles_whole(perceiver):
    model, inputs = perceiver
    plain = model(*inputs)
    fastdiff.accelerate(model, show=False)
    compiled = torch.compile(model.layers[0], backend="eager", fullgraph=True)
    x, context = torch.randn(2, 12, 24), torch.randn(2, 90, 17)
    torch.testing.assert_close(compiled(x, context=context), model.layers[0](x, context=context))
    torch.testing.assert_close(model(*inputs), plain)
