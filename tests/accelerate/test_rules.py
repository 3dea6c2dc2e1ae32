"""Each rule's replacement against the class it replaces: values, gradients, masks, and the calls it hands back."""

import copy
import pickle
from contextlib import contextmanager

import pytest
import torch

import fastdiff
from fastdiff.accelerate import rules


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


def test_a_perceiver_with_hooks_runs_its_modules(perceiver, reads):
    model, inputs = perceiver
    fastdiff.accelerate(model, show=False)
    calls = []
    for m in (model.layers[0], model.layers[1].cross_attn.norm):
        handle = m.register_forward_hook(lambda *_: calls.append(1))
        model(*inputs)
        handle.remove()
    assert len(calls) == 2 and not reads
    model(*inputs)
    assert len(reads) == 2


def test_perceiver_io(perceiver_pytorch):
    model = perceiver_pytorch.PerceiverIO(depth=2, dim=16, queries_dim=20, logits_dim=5, num_latents=12, latent_dim=24, latent_heads=3,
                                          latent_dim_head=8, cross_dim_head=16)
    compared(model, (torch.randn(2, 30, 16),), mask=torch.rand(2, 30) < 0.6, queries=torch.randn(6, 20))


class Result(torch.nn.Module):
    """A transformers model that returns one tensor of its output."""

    def __init__(self, model, name):
        super().__init__()
        self.model, self.name = model, name

    def forward(self, *inputs, **options):
        return self.model(*inputs, **options)[self.name]


def near(fast, plain):
    """Within what the plain model's angles, rounded to float32 before sine and cosine, move its results."""
    torch.testing.assert_close(fast, plain, rtol=1e-2, atol=2e-3)


@pytest.fixture
def reads(monkeypatch):
    """The calls of fourier_cross_attend that the rules make."""
    calls, op = [], fastdiff.ops.fourier_cross_attend
    for package in (rules.perceiver_pytorch, rules.transformers):
        monkeypatch.setattr(package, "fourier_cross_attend", lambda *a, **options: calls.append(a) or op(*a, **options))
    return calls


@pytest.fixture
def exact_places(transformers_perceiver, monkeypatch):
    """Theirs makes places in float32 whatever the model's dtype: here in the default dtype."""

    def places(index_dims, output_range=(-1.0, 1.0), device=None):
        return torch.stack(torch.meshgrid(*(torch.linspace(*output_range, n) for n in index_dims), indexing="ij"), -1)

    monkeypatch.setattr(transformers_perceiver, "build_linear_positions", places)


@pytest.mark.parametrize("options", [{}, {"qk_channels": 12, "v_channels": 24}, {"use_query_residual": False}], ids=str)
def test_transformers_classifier(transformers_classifier, exact_places, reads, options):
    compared(Result(transformers_classifier(**options), "logits"), (torch.randn(2, 3, 11, 8),))
    assert len(reads) == 1


def test_transformers_video(transformers_perceiver, transformers_classifier, exact_places, reads):
    config = transformers_classifier().config
    preprocessor = transformers_perceiver.PerceiverImagePreprocessor(
        config, prep_type="pixels", spatial_downsample=1, fourier_position_encoding_kwargs=dict(num_bands=3, max_resolution=[4, 10, 12]))
    model = transformers_perceiver.PerceiverModel(config, input_preprocessor=preprocessor).eval()
    compared(Result(model, "last_hidden_state"), (torch.randn(2, 4, 3, 5, 6),))
    assert len(reads) == 1


def test_transformers_output(transformers_classifier, reads):
    """The same outputs by name and as a tuple; what only the original makes, it makes."""
    model, x = transformers_classifier(), torch.randn(2, 3, 11, 8)
    calls = [{}, {"return_dict": False}, {"output_hidden_states": True}, {"output_attentions": True}]
    plain = [model.perceiver(x, **options) for options in calls]
    assert "dropout 0.1: the original runs in training mode" in [row.note for row in fastdiff.accelerate(model, show=False).replaced]
    for options, before in zip(calls, plain, strict=True):
        after = model.perceiver(x, **options)
        assert type(after) is type(before)
        a, b = ((out, ()) if isinstance(out, tuple) else (out.to_tuple(), out.keys()) for out in (after, before))
        assert list(a[1]) == list(b[1])
        near(a[0], b[0])
    assert len(reads) == 2


def test_transformers_calls_that_stay_with_the_original(transformers_classifier, reads):
    model, x = transformers_classifier(), torch.randn(2, 3, 11, 8)
    seen = (torch.rand(2, 88) < 0.5).float()

    def runs():
        torch.manual_seed(1)
        return model.train()(x).logits, model.eval()(x, attention_mask=seen).logits

    plain = runs()
    fastdiff.accelerate(model, show=False)
    fast = runs()
    assert torch.equal(plain[0], fast[0])
    near(fast[1], plain[1])
    calls, perceiver = [], model.perceiver
    for m in (perceiver.input_preprocessor, perceiver.encoder, perceiver.encoder.cross_attention.attention.self.key):
        handle = m.register_forward_hook(lambda *_: calls.append(1))
        model(x)
        handle.remove()
    assert len(calls) == 3 and not reads
    model(x)
    assert len(reads) == 1


def test_transformers_left_alone_and_why(transformers_perceiver, transformers_classifier):
    package, config = transformers_perceiver, transformers_classifier().config
    positions = dict(num_bands=3, max_resolution=[8, 8])
    pixels = lambda prep_type="pixels": package.PerceiverImagePreprocessor(
        config, prep_type=prep_type, spatial_downsample=1, fourier_position_encoding_kwargs=positions)
    decoder = lambda kind, **options: getattr(package, f"Perceiver{kind}Decoder")(
        config, num_channels=24, trainable_position_encoding_kwargs=dict(num_channels=24, index_dims=1), **options)
    for options, why in (
            (dict(input_preprocessor=package.PerceiverTextPreprocessor(config)), "a PerceiverTextPreprocessor, not"),
            (dict(input_preprocessor=pixels(prep_type="conv1x1")), "prep_type='conv1x1'"),
            (dict(input_preprocessor=pixels(), decoder=decoder("Classification", concat_preprocessed_input=True)), "made from the input"),
            (dict(input_preprocessor=pixels(), decoder=torch.nn.Identity()), "Identity, which may want the input's features")):
        report = fastdiff.accelerate(package.PerceiverModel(config, **options), show=False)
        assert why in next(row.reason for row in report.kept if row.name == "(the model)")
        assert {row.kind.split(".")[-1] for row in report.replaced} == {"PerceiverSelfAttention"}
    uneven = package.PerceiverModel(config, input_preprocessor=pixels())
    uneven.encoder.cross_attention.attention.self.layernorm2.eps = 1e-12
    assert "norms have different eps, 1e-05 and 1e-12" in fastdiff.accelerate(uneven, show=False).kept[0].reason
    for made in (decoder("Classification"), decoder("Basic", output_num_channels=5), None):
        report = fastdiff.accelerate(package.PerceiverModel(config, input_preprocessor=pixels(), decoder=made), show=False)
        assert "(the model)" in [row.name for row in report.replaced]
    report = fastdiff.accelerate(package.PerceiverSelfAttention(config, qk_channels=12, v_channels=24, q_dim=24, kv_dim=24), show=False)
    assert not report.replaced and "queries and keys of 12 channels, values of 24" in report.kept[0].reason


def additive(seen, dtype=torch.float32):
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)


@pytest.mark.parametrize("which", [0, 1], ids=["half", "a sample without keys"])
@pytest.mark.parametrize("shape", [(2, 1, 1, 9), (2, 1, 5, 9), (1, 3, 5, 9)], ids=str)
def test_transformers_mask(transformers_perceiver, transformers_classifier, which, shape):
    config = transformers_classifier().config
    attend = transformers_perceiver.PerceiverSelfAttention(config, is_cross_attention=True, num_heads=3, qk_channels=12, q_dim=24,
                                                          kv_dim=10)
    mask = additive(masks(*shape)[which])
    compared(Result(attend.eval(), 0), (torch.randn(2, 5, 24),), inputs=torch.randn(2, 9, 10), inputs_mask=mask)
    compared(Result(attend, 0), (torch.randn(2, 5, 24),), inputs=torch.randn(2, 9, 10), inputs_mask=mask + torch.randn(shape))


def test_transformers_self_attention_mask(transformers_perceiver, transformers_classifier):
    config = transformers_classifier().config
    attend = transformers_perceiver.PerceiverSelfAttention(config, num_heads=3, q_dim=24, kv_dim=24).eval()
    compared(Result(attend, 0), (torch.randn(2, 9, 24),), attention_mask=additive(masks(2, 1, 1, 9)[1]))


def test_transformers_text(transformers_perceiver, transformers_classifier):
    """A general Perceiver, with a mask of padding."""
    config = transformers_perceiver.PerceiverConfig(
        num_latents=6, d_latents=24, d_model=20, num_self_attends_per_block=1, num_self_attention_heads=3, num_cross_attention_heads=2,
        vocab_size=30, max_position_embeddings=16)
    model = transformers_perceiver.PerceiverForSequenceClassification(config).eval()
    tokens, seen = torch.randint(30, (2, 16)), torch.arange(16) < torch.tensor([[16], [9]])
    plain = model(tokens, attention_mask=seen).logits
    report = fastdiff.accelerate(model, show=False)
    assert len(report.replaced) == 3
    torch.testing.assert_close(model(tokens, attention_mask=seen).logits, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_transformers_half(transformers_classifier, dtype):
    model, x = transformers_classifier().to(dtype), torch.randn(2, 3, 11, 8).to(dtype)
    seen = torch.ones(2, 88)
    seen[0] = 0
    right = [copy.deepcopy(model).double()(x.double(), attention_mask=mask).logits for mask in (None, seen)]
    before = [model(x, attention_mask=mask).logits for mask in (None, seen)]
    fastdiff.accelerate(model, show=False)
    for mask, exact, plain in zip((None, seen), right, before, strict=True):
        fast = model(x, attention_mask=mask).logits
        assert fast.dtype == dtype
        assert (fast - exact).abs().max() <= 2 * (plain - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max()


def test_transformers_autocast(transformers_classifier):
    model, x, seen = transformers_classifier(), torch.randn(2, 3, 11, 8), torch.zeros(2, 88)
    with torch.autocast("cpu", torch.bfloat16):
        plain = [model(x, attention_mask=mask).logits for mask in (None, seen)]
        fastdiff.accelerate(model, show=False)
        fast = [model(x, attention_mask=mask).logits for mask in (None, seen)]
    torch.testing.assert_close(fast, plain, rtol=0.1, atol=0.1)


def test_transformers_compiles_whole(transformers_classifier):
    model, x = transformers_classifier(), torch.randn(2, 3, 11, 8)
    plain = model(x).logits
    fastdiff.accelerate(model, show=False)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    near(compiled(x).logits, plain)


def test_transformers_pickle(transformers_classifier):
    model, x = transformers_classifier(), torch.randn(2, 3, 11, 8)
    plain = model(x).logits
    fastdiff.accelerate(model, show=False)
    other = pickle.loads(pickle.dumps(model))
    assert torch.equal(other(x).logits, model(x).logits)
    assert torch.equal(fastdiff.restore(other)(x).logits, plain)


@pytest.fixture
def calls(monkeypatch):
    """Names of the patch ops that the rules call."""
    names = []
    for name in ("patch_embed", "patchify", "unpatch_project", "unpatchify"):
        op = getattr(fastdiff.ops, name)
        for module in (rules.einops, rules.patches):
            monkeypatch.setattr(module, name, lambda *a, name=name, op=op, **o: names.append(name) or op(*a, **o), raising=False)
    return names


@pytest.mark.parametrize("options", [{}, {"bias": False, "patch_size": (2, 4)}, {"norm_layer": torch.nn.LayerNorm}, {"img_size": None},
                                     {"dynamic_img_pad": True}, {"strict_img_size": False, "img_size": 4}], ids=str)
def test_timm_patches(timm_patch_embed, calls, options):
    module = timm_patch_embed(**dict(img_size=(8, 12), patch_size=4, embed_dim=20) | options)
    compared(module, (torch.randn(2, 3, 8, 12),))
    assert calls == ["patch_embed"]


def test_timm_images_that_stay_with_the_original(timm_patch_embed, calls):
    """Padded, cut short, refused: as before."""
    padded = timm_patch_embed(img_size=None, patch_size=4, embed_dim=20, dynamic_img_pad=True)
    cut = timm_patch_embed(img_size=None, patch_size=4, embed_dim=20)
    strict = timm_patch_embed(img_size=8, patch_size=4, embed_dim=20)
    hooked, heard = timm_patch_embed(img_size=8, patch_size=4, embed_dim=20), []
    x, small = torch.randn(2, 3, 10, 9), torch.randn(2, 3, 8, 8)
    plain = [padded(x), cut(x), hooked(small)]
    for m in (padded, cut, strict, hooked):
        assert fastdiff.accelerate(m, show=False).replaced
    with pytest.raises(AssertionError, match="doesn't match model"):
        strict(torch.randn(2, 3, 16, 16))
    hooked.proj.register_forward_hook(lambda *_: heard.append(1))
    for one, other in zip(plain, (padded(x), cut(x), hooked(small)), strict=True):
        assert torch.equal(one, other)
    assert heard and not calls
    strict.set_input_size(12, 2)
    assert strict(torch.randn(2, 3, 12, 12)).shape == (2, 36, 20) and calls == ["patch_embed"]


def test_patch_embeddings_left_alone_and_why(timm_patch_embed, diffusers_patch_embed):
    strided, linear = (timm_patch_embed(img_size=8, patch_size=4, embed_dim=20) for _ in range(2))
    strided.proj.stride, linear.proj = (2, 2), torch.nn.Linear(3, 4)
    for module, why in ((timm_patch_embed(img_size=8, patch_size=4, embed_dim=20, output_fmt="NHWC"), "keeps the grid"),
                        (diffusers_patch_embed(8, 8, 4, 3, 20, flatten=False, pos_embed_type=None), "keeps the grid"),
                        (strided, "not one of patches side by side"), (linear, "its projection is a Linear, not a Conv2d")):
        report = fastdiff.accelerate(module, show=False)
        assert not report.replaced and why in report.kept[0].reason


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"layer_norm": True}, {"pos_embed_type": None}, {"interpolation_scale": 2},
                                     {"pos_embed_max_size": 6}, {"layer_norm": True, "pos_embed_type": None}], ids=str)
def test_diffusers_patches(diffusers_patch_embed, calls, options):
    compared(diffusers_patch_embed(height=16, width=16, patch_size=4, embed_dim=20, **options), (torch.randn(2, 3, 16, 16),))
    assert calls == ["patch_embed"]


def test_diffusers_patches_of_other_images(diffusers_patch_embed, calls):
    """Cropped positions are the table's; positions of a grid that was not foreseen are made by the original."""
    for options, expected in (({"pos_embed_max_size": 6}, ["patch_embed"]), ({"pos_embed_type": None}, ["patch_embed"]), ({}, [])):
        calls.clear()
        compared(diffusers_patch_embed(height=16, width=16, patch_size=4, embed_dim=20, **options), (torch.randn(2, 3, 8, 20),))
        assert calls == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_diffusers_half(diffusers_patch_embed, calls, dtype):
    module, x = diffusers_patch_embed(height=16, width=16, patch_size=4, embed_dim=20).to(dtype), torch.randn(2, 3, 16, 16).to(dtype)
    exact, plain = copy.deepcopy(module).double()(x.double()), module(x)
    fastdiff.accelerate(module, show=False)
    fast = module(x)
    assert fast.dtype == dtype and calls
    assert (fast - exact).abs().max() <= 2 * (plain - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max()


def test_patch_embeddings_compile_whole(timm_patch_embed, diffusers_patch_embed):
    for module in (timm_patch_embed(img_size=16, patch_size=4, embed_dim=20), diffusers_patch_embed(16, 16, 4, 3, 20),
                   diffusers_patch_embed(8, 8, 4, 3, 20, pos_embed_max_size=6)):
        x = torch.randn(2, 3, 16, 16)
        plain = module(x)
        fastdiff.accelerate(module, show=False)
        torch.testing.assert_close(torch.compile(module, backend="eager", fullgraph=True)(x), plain)
    torch.compiler.reset()


def stem(rin_pytorch, *modules):
    """A Sequential of modules, those given as text being Rearranges with patch (2, 4)."""
    rearrange = rin_pytorch.rin_pytorch.Rearrange
    return torch.nn.Sequential(*(rearrange(m[0], **m[1]) if isinstance(m, tuple) else m for m in modules))


P = dict(p=2, q=4)
STEMS = {
    "cpq": ((("b c (h p) (w q) -> b (h w) (c p q)", P), torch.nn.Linear(24, 10)), (2, 3, 6, 8), ["patch_embed"]),
    "pqc": ((("b c (h p) (w q) -> b (h w) (p q c)", P), torch.nn.Linear(24, 10, False), torch.nn.SiLU()), (2, 3, 6, 8), ["patch_embed"]),
    "norm": ((("b c (h p) (w q) -> b (h w) (p q c)", P), torch.nn.LayerNorm(24), torch.nn.Linear(24, 10)), (2, 3, 6, 8), ["patchify"]),
    "video": ((("b c (t f) (h p) (w q) -> b (t h w) (c f p q)", P | dict(f=2)), torch.nn.Linear(48, 10)), (2, 3, 4, 6, 8), ["patch_embed"]),
    "sound": ((("b c (n p) -> b n (p c)", dict(p=4)), torch.nn.Linear(8, 10)), (2, 2, 12), ["patch_embed"]),
    "out": ((torch.nn.Linear(10, 24), ("b (h w) (p q c) -> b c (h p) (w q)", P | dict(h=3))), (2, 6, 10), ["unpatch_project"]),
    "out of two": ((torch.nn.Linear(10, 24), ("b (h w) (c p q) -> b c (h p) (w q)", P | dict(h=3, w=2))), (2, 6, 10), ["unpatch_project"]),
    "out alone": ((torch.nn.SiLU(), ("b (h w) (p q c) -> b c (h p) (w q)", P | dict(w=2))), (2, 6, 24), ["unpatchify"]),
    "there and back": ((("b c (h p) (w q) -> b (h w) (p q c)", P), torch.nn.Linear(24, 10), torch.nn.Linear(10, 24),
                        ("b (h w) (p q c) -> b c (h p) (w q)", P | dict(h=3))), (2, 3, 6, 8), ["patch_embed", "unpatch_project"]),
}


@pytest.mark.parametrize("name", STEMS)
def test_stems(rin_pytorch, calls, name):
    modules, shape, expected = STEMS[name]
    compared(stem(rin_pytorch, *modules), (torch.randn(shape),))
    assert calls == expected


def test_stems_that_are_none(rin_pytorch, calls):
    """Other rearrangements have no rule, and images or calls a rearrangement would refuse are refused as before."""
    for pattern, lengths in (("b c (h p) (w q) -> b (w h) (p q c)", P), ("b c (p h) (q w) -> b (h w) (p q c)", P),
                             ("b c (h p) (w q) -> b (h w) (p c q)", P), ("b c (h p) (w q) -> b (h w) (p q c)", dict(h=3, w=2)),
                             ("... -> ... 1", {}), ("b d -> b 1 d", {}), ("b c (h p) (w 1) -> b (h w) (p 1 c)", dict(p=2)),
                             ("b c (h p) (w q) -> b (h w) (p q c)", P | dict(c=3))):
        report = fastdiff.accelerate(stem(rin_pytorch, (pattern, lengths), torch.nn.Linear(24, 10)), show=False)
        assert not report.replaced and not [row for row in report.kept if "Sequential" in row.kind], pattern
    subclass = type("Stem", (torch.nn.Sequential,), {})(*stem(rin_pytorch, *STEMS["cpq"][0]))
    assert "a subclass of" in fastdiff.accelerate(subclass, show=False).kept[0].reason
    model = stem(rin_pytorch, ("b c (h p) (w q) -> b (h w) (p q c)", P | dict(h=3)), torch.nn.Linear(24, 10))
    fastdiff.accelerate(model, show=False)
    for shape in ((2, 3, 7, 8), (2, 3, 8, 8), (3, 6, 8)):
        with pytest.raises(Exception, match=r"ismatch|divide|3"):
            model(torch.randn(shape))
    assert not calls
    handle = model[1].register_forward_hook(lambda m, inputs, out: 2 * out)
    doubled = model(torch.randn(2, 3, 6, 8))
    handle.remove()
    assert calls == ["patchify"] and doubled.shape == (2, 6, 10)
    assert torch.equal(model[:1](torch.ones(2, 3, 6, 8)), torch.ones(2, 6, 24))


def test_a_stem_compiles_whole(rin_pytorch):
    model, x = stem(rin_pytorch, *STEMS["there and back"][0]), torch.randn(2, 3, 6, 8)
    plain = model(x)
    fastdiff.accelerate(model, show=False)
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), plain)


def test_rin_without_patch_norms(rin_pytorch, calls):
    model = rin_pytorch.RIN(dim=32, image_size=16, patch_size=4, depth=1, latent_self_attn_depth=1, num_latents=8, heads=2, dim_head=16,
                            dual_patchnorm=False)
    compared(model, (torch.randn(2, 3, 16, 16), torch.rand(2)))
    assert calls == ["patch_embed", "unpatch_project"]


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
    assert [row.name for row in report.replaced] == ["0", "4"]
    why = {row.name: row.reason for row in report.kept}
    assert "subclass of rin_pytorch.attend.Attend" in why["1"]
    assert "replaced on the instance" in why["2"]
    assert "inverted" in why["3"]
    assert "need_weights" in report.replaced[1].note


def test_a_version_with_more_options_is_left_alone(perceiver_pytorch, monkeypatch):
    kind = perceiver_pytorch.perceiver_pytorch.Attention
    plain = kind.__init__
    monkeypatch.setattr(kind, "__init__", lambda self, query_dim, heads=8, softcap=None: plain(self, query_dim, heads=heads))
    report = fastdiff.accelerate(kind(8, heads=2), show=False)
    assert not report.replaced and "softcap" in report.kept[0].reason


def test_reads_heads_in_place(perceiver_pytorch, monkeypatch):
    seen = []
    monkeypatch.setattr(rules.perceiver_pytorch, "attention", lambda q, k, v, **options: seen.append((q, k, v)) or q)
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
