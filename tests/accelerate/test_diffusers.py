"""The rules of diffusers against its own modules and models."""

import copy
import importlib

import pytest
import torch
from test_rules import Result, compared

import fastdiff
from fastdiff.accelerate.rules import diffusers as rules
from fastdiff.accelerate.rules import rule

OPS = ("attention", "gate_residual", "gate_residual_norm_modulate", "geglu", "group_norm_modulate", "layer_norm_modulate")


@pytest.fixture
def part(diffusers_embeddings):
    """A module of diffusers.models by name; UNets and transformers by their folders."""
    return lambda name: importlib.import_module(f"diffusers.models.{name}")


@pytest.fixture
def calls(monkeypatch):
    """The names of the ops that the rules call, in order; few scores are worth one here."""
    made = []

    def recorded(name, op):
        return lambda *arguments, **options: made.append(name) or op(*arguments, **options)

    for name in OPS:
        monkeypatch.setattr(rules, name, recorded(name, getattr(rules, name)))
    monkeypatch.setattr(rule, "SCORES", dict.fromkeys((False, True), 0))
    return made


RESNETS = [{}, dict(time_embedding_norm="scale_shift"), dict(temb_channels=None), dict(skip_time_act=True, up=True), dict(down=True),
           dict(down=True, kernel="fir", out_channels=12, output_scale_factor=2 ** 0.5, eps=1e-3, groups_out=3)]


@pytest.mark.parametrize("options", RESNETS, ids=str)
def test_resnet(part, calls, options):
    block = part("resnet").ResnetBlock2D(**dict(in_channels=8, temb_channels=6, groups=4) | options)
    for norm in (block.norm1, block.norm2):
        torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    x = torch.randn(2, 8, 6, 4)
    if block.time_emb_proj is None:
        compared(block, (x,), temb=torch.zeros(2, 12 if "out_channels" in options else 8, 1, 1))
    else:
        compared(block, (x, torch.randn(2, 6)))
    assert calls == ["group_norm_modulate"] * 2


def test_resnet_without_a_condition(part, calls):
    block, x = part("resnet").ResnetBlock2D(in_channels=8, temb_channels=None, groups=4), torch.randn(64, 8, 2, 2)
    plain = block(x, None)
    fastdiff.accelerate(block, show=False)
    torch.testing.assert_close(block(x, None), plain)


def test_small_images_and_watched_norms_keep_the_modules(part, calls, monkeypatch):
    monkeypatch.setattr(rule, "FROM", dict.fromkeys(rule.FROM, (1, 1 << 20)))
    block, x, t = part("resnet").ResnetBlock2D(in_channels=8, temb_channels=6, groups=4), torch.randn(2, 8, 4, 4), torch.randn(2, 6)
    fastdiff.accelerate(block, show=False)
    block(x, t)
    assert calls == ["group_norm_modulate"]  # the second norm's input wants gradients
    with torch.no_grad():
        block(x, t)
        assert len(calls) == 3
        seen = []
        block.norm2.register_forward_hook(lambda *_: seen.append(1))
        block(x, t)
    assert len(calls) == 4 and seen


NORMS = [("AdaLayerNorm", (8, 20), dict(timestep=torch.tensor(7))), ("AdaLayerNorm", (8, None, None, True, 1e-3, 1), ["temb"]),
         ("AdaLayerNormZero", (8, 5), dict(timestep=torch.tensor([3, 700]), class_labels=torch.tensor([1, 4]))),
         ("AdaLayerNormZero", (8,), ["emb"]), ("AdaLayerNormZeroSingle", (8,), ["emb"]),
         ("AdaLayerNormContinuous", (8, 8), ["conditioning_embedding"])]


@pytest.mark.parametrize(("name", "options", "given"), NORMS, ids=range(len(NORMS)))
def test_norms(part, calls, name, options, given):
    class First(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = getattr(part("normalization"), name)(*options).eval()

        def forward(self, x, **keywords):
            if "class_labels" in keywords:
                keywords["hidden_dtype"] = x.dtype
            out = self.norm(x, **keywords)
            return torch.cat([t.flatten() for t in out]) if isinstance(out, tuple) else out

    given = given if isinstance(given, dict) else {key: torch.randn(2, 8) for key in given}
    compared(First(), (torch.randn(2, 5, 8),), **given)
    assert calls == ["layer_norm_modulate"]


def test_geglu(part, calls):
    compared(part("activations").GEGLU(6, 10), (torch.randn(2, 5, 6),))
    assert calls == ["geglu"]


@pytest.mark.parametrize(("mask", "options"), [
    (None, {}), ("float", dict(bias=True, rescale_output_factor=2.0)), ("bool", dict(cross_attention_norm="layer_norm")),
    ("float", dict(processor="AttnProcessor", scale_qk=False))], ids=str)
def test_cross_attention(part, calls, mask, options):
    package = part("attention_processor")
    processor = getattr(package, options.get("processor", "AttnProcessor2_0"))()
    attention = package.Attention(8, 6, heads=2, dim_head=5, **options | dict(processor=processor))
    seen = torch.rand(2, 1, 7) < 0.7
    given = {"float": dict(attention_mask=torch.where(seen, 0.0, -100.0)), "bool": dict(attention_mask=seen), None: {}}[mask]
    compared(attention, (torch.randn(2, 4, 8), torch.randn(2, 7, 6)), **given)
    assert calls == ["attention"]


def test_few_scores_are_left_to_pytorch(part, calls, monkeypatch):
    monkeypatch.setattr(rule, "SCORES", {False: 2 * 2 * 4 * 5, True: 2 * 2 * 4 * 5 + 1})
    attention, x, source = part("attention_processor").Attention(8, 6, heads=2, dim_head=5), torch.randn(2, 4, 8), torch.randn(2, 5, 6)
    fastdiff.accelerate(attention, show=False)
    attention(x.requires_grad_(), source)
    assert not calls
    attention(x.detach(), source), attention(x.detach(), source[:, 1:])
    assert calls == ["attention"]


def test_attention_over_an_image(part, calls):
    attention = part("attention_processor").Attention(8, heads=2, dim_head=4, norm_num_groups=2, residual_connection=True, bias=True)
    compared(attention, (torch.randn(2, 8, 3, 4),))
    assert calls == ["attention"]


@pytest.mark.parametrize("options", [dict(norm_type="ada_norm_zero", num_embeds_ada_norm=10),
                                     dict(norm_type="ada_norm_single", cross_attention_dim=6, norm_elementwise_affine=False),
                                     dict(norm_type="ada_norm_single")], ids=str)
def test_block(part, calls, options):
    block = part("attention").BasicTransformerBlock(8, 2, 4, **options).eval()
    given = dict(timestep=torch.tensor([3, 700]), class_labels=torch.tensor([1, 4]))
    if options["norm_type"] == "ada_norm_single":
        given = dict(timestep=torch.randn(2, 48))
    if "cross_attention_dim" in options:
        given["encoder_hidden_states"] = torch.randn(2, 7, 6)
    compared(block, (torch.randn(2, 5, 8),), **given)
    between = ["gate_residual", "attention", "layer_norm_modulate"] if "cross_attention_dim" in options else ["gate_residual_norm_modulate"]
    assert calls == ["layer_norm_modulate", "attention", *between, "geglu", "gate_residual"]


def test_a_block_in_chunks_is_the_original(part, calls):
    block = part("attention").BasicTransformerBlock(8, 2, 4, norm_type="ada_norm_zero", num_embeds_ada_norm=10).eval()
    fastdiff.accelerate(block, show=False)
    block.set_chunk_feed_forward(1, 1)
    block(torch.randn(2, 5, 8), timestep=torch.tensor([3, 700]), class_labels=torch.tensor([1, 4]))
    assert calls == ["layer_norm_modulate", "attention", *["geglu"] * 5]


@pytest.fixture
def unet(part):
    kinds = dict(down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"))
    model = part("unets").UNet2DModel(sample_size=8, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1,
                                      attention_head_dim=4, resnet_time_scale_shift="scale_shift", **kinds)
    return Result(model.eval(), "sample"), (torch.randn(2, 3, 8, 8),), dict(timestep=torch.tensor([3, 700]))


@pytest.fixture
def conditional(part):
    kinds = dict(down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
    model = part("unets").UNet2DConditionModel(sample_size=8, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1,
                                               cross_attention_dim=6, attention_head_dim=4, **kinds)
    return Result(model.eval(), "sample"), (torch.randn(2, 4, 8, 8),), dict(
        timestep=torch.tensor([3, 700]), encoder_hidden_states=torch.randn(2, 7, 6), encoder_attention_mask=torch.rand(2, 7) < 0.7)


@pytest.fixture
def dit(part):
    model = part("transformers").DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, num_layers=2, sample_size=8,
                                                       num_embeds_ada_norm=10)
    return Result(model.eval(), "sample"), (torch.randn(2, 4, 8, 8),), dict(
        timestep=torch.tensor([3, 700]), class_labels=torch.tensor([1, 4]))


@pytest.fixture
def text(part):
    model = part("transformers").Transformer2DModel(num_attention_heads=2, attention_head_dim=8, in_channels=8, norm_num_groups=4,
                                                    cross_attention_dim=6)
    return Result(model.eval(), "sample"), (torch.randn(2, 8, 4, 4), torch.randn(2, 7, 6)), {}


@pytest.mark.parametrize("name", ["unet", "conditional", "dit", "text"])
def test_models(request, calls, name):
    model, inputs, given = request.getfixturevalue(name)
    keys, kinds = list(model.state_dict()), [type(m) for m in model.modules()]
    plain = model(*inputs, **given)
    compared(model, inputs, **given)
    expected = {"unet": {"attention", "group_norm_modulate"}, "conditional": {"attention", "group_norm_modulate", "geglu"},
                "dit": set(OPS) - {"geglu", "group_norm_modulate"}, "text": {"attention", "geglu"}}
    assert set(calls) == expected[name]
    fastdiff.accelerate(model, show=False)
    assert list(model.state_dict()) == keys
    fastdiff.restore(model)
    assert [type(m) for m in model.modules()] == kinds and torch.equal(model(*inputs, **given), plain)


def test_a_pickled_copy_and_half_precision(dit, calls):
    model, inputs, given = dit
    exact = copy.deepcopy(model).double()(*(x.double() for x in inputs), **given)
    model.bfloat16()
    half = [x.bfloat16() for x in inputs]
    plain = model(*half, **given)
    fastdiff.accelerate(model, show=False)
    fast = copy.deepcopy(model)(*half, **given)
    assert calls and fast.dtype == torch.bfloat16
    assert (fast - exact).abs().max() <= 2 * (plain - exact).abs().max() + 2 ** -8 * exact.abs().max()


@pytest.mark.parametrize("name", ["unet", "conditional", "dit"])
def test_autocast(request, calls, name):
    model, inputs, given = request.getfixturevalue(name)
    with torch.autocast("cpu", torch.bfloat16):
        plain = model(*inputs, **given)
        fastdiff.accelerate(model, show=False)
        fast = model(*inputs, **given)
    assert calls and fast.dtype == plain.dtype
    torch.testing.assert_close(fast, plain, rtol=0.05, atol=0.05 * plain.abs().max().item())


@pytest.mark.parametrize("name", ["unet", "dit"])
def test_compiles_whole(request, calls, name):
    model, inputs, given = request.getfixturevalue(name)
    plain = model(*inputs, **given)
    fastdiff.accelerate(model, show=False)
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(*inputs, **given), plain)


def test_left_alone_and_why(part):
    attention = part("attention_processor").Attention
    modules = [part("resnet").ResnetBlock2D(in_channels=8, groups=4, non_linearity="gelu"),
               part("normalization").AdaLayerNormZero(8, norm_type="fp32_layer_norm"),
               attention(8, heads=2, dim_head=4, qk_norm="layer_norm"), attention(8, heads=2, dim_head=4, kv_heads=1),
               attention(8, heads=2, dim_head=4, processor=part("attention_processor").SlicedAttnProcessor(1)),
               part("attention").BasicTransformerBlock(8, 2, 4)]
    reasons = ["activation is GELU", "norm is a FP32LayerNorm", "norms of queries and keys", "one number of heads", "SlicedAttnProcessor",
               "nothing to gain"]
    for m, reason in zip(modules, reasons, strict=True):
        assert reason in fastdiff.accelerate(m, show=False).kept[0].reason


def test_gradient_checkpointing(dit, calls):
    model, inputs, given = dit
    model.model.enable_gradient_checkpointing()
    model(*inputs, **given).sum().backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    fastdiff.accelerate(model, show=False)
    model(*inputs, **given).sum().backward()
    assert calls.count("gate_residual_norm_modulate") == 4  # 2 layers, each twice
    torch.testing.assert_close([p.grad for p in model.parameters()], plain, rtol=1e-4, atol=1e-4)
