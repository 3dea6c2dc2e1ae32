"""DiT against the published program's results, live against diffusers', and the sheet's sizes."""

import pytest
import torch

from fastdiff.demo import define_torchvision_operators
from fastdiff.models import DiT, dit
from fastdiff.nn import sinusoid

# name -> the program's own errors in float32: of outputs, of gradients
PUBLISHED = {"dit": (3.0e-6, 1.0e-5), "dit_no_dropout": (1.7e-6, 1.9e-5)}
# size -> millions of parameters and milliards of multiply-adds of a pass over one image, at patches 2, 4, 8
SIZES = {"S": ((33.0, 32.9, 33.1), (6.06, 1.41, 0.36)), "B": ((130.5, 130.5, 130.9), (23.0, 5.57, 1.42)),
         "L": ((458.1, 458.1, 458.6), (80.7, 19.7, 5.01)), "XL": ((675.1, 675.1, 675.7), (118.6, 29.0, 7.39))}
TINY = dict(depth=2, dim=32, heads=2, patch=2, size=8, classes=7)


def load(file, dtype):
    c = file.config
    model = DiT(depth=c["depth"], dim=c["hidden_size"], heads=c["num_heads"], patch=c["patch_size"], size=c["input_size"],
                channels=c["in_channels"], mlp_ratio=c["mlp_ratio"], classes=c["num_classes"], dropout=c["class_dropout_prob"],
                variance=c["learn_sigma"])
    assert torch.equal(model.x_embedder.pos_embed, file["weights/pos_embed"])
    model.load_dit(file.weights)
    return model.to(dtype).eval()


@pytest.mark.parametrize("name", PUBLISHED)
def test_equals_the_published(golden, held, name):
    file, (outputs, grads) = golden(name), PUBLISHED[name]
    model = load(file, held.dtype)
    x = file["in/x"].to(held.dtype).requires_grad_()
    out = model(x, file["in/t"], file["in/y"])
    (out * file["cot/main/out"].to(held.dtype)).sum().backward()
    held.outputs(outputs, out=(out, file["out/main/out"]))
    wanted = dit.renamed(file.under("grad/main/weights/"))
    held.gradients(grads, {"x": (x.grad, file["grad/main/x"])}
                   | {name: (model.get_parameter(name).grad, value) for name, value in wanted.items()})


def test_dropped_labels_and_guidance_equal_the_published(golden, held):
    file = golden("dit")
    model, x = load(file, held.dtype), file["in/x"].to(held.dtype)
    t, y, scale = file["in/cfg_t"][:2], file["in/cfg_y"][:2], file["in/cfg_scale"].item()
    with torch.no_grad():
        guided = model.guided(x[:2], t, y, scale)
        dropped = model.train()(x, file["in/t"], file["in/y"], drop=file["in/drop_mask"].bool())
        # Its second half has the guided channels again, and the others of the null label.
        null = model.eval()(x[:2], t, file["in/cfg_y"][2:])
    both = torch.cat((guided, torch.cat((guided[:, :3], null[:, 3:]), 1)))
    held.outputs(PUBLISHED["dit"][0], dropped=(dropped, file["out/dropped/out"]), cfg=(both, file["out/cfg/out"]))


@pytest.fixture
def theirs():
    """diffusers' DiT with random weights, one embedder in all blocks, and the published DiT's times and eps."""
    define_torchvision_operators()
    package = pytest.importorskip("diffusers.models.transformers.dit_transformer_2d", reason="diffusers is not installed")
    model = package.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2, sample_size=8, patch_size=2,
        num_embeds_ada_norm=7, norm_type="ada_norm_zero", activation_fn="gelu-approximate", attention_bias=True).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0.0, 0.2)
    embedder = model.transformer_blocks[0].norm1.emb
    embedder.time_proj = Sinusoid()
    for block in model.transformer_blocks:
        block.norm1.emb, block.norm3.eps = embedder, 1e-6
    return model


class Sinusoid(torch.nn.Module):
    def forward(self, t):
        return sinusoid(t, 256)


def test_equals_diffusers(theirs):
    model = DiT(**TINY).double().eval()
    model.load_diffusers(theirs.state_dict())
    x, t, y = torch.randn(3, 4, 8, 8, dtype=torch.float64), torch.tensor([0, 431, 999]), torch.tensor([0, 6, 7])
    sides = []
    for function in (lambda x: model(x, t, y), lambda x: theirs(x, t, y).sample):
        given = x.clone().requires_grad_()
        out = function(given)
        (out * torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)).sum().backward()
        sides.append((out, given.grad))
    block = theirs.transformer_blocks[1]
    sides[0] += model.blocks[1].modulation.weight.grad, model.blocks[0].mlp.fc1.bias.grad, model.y_embedder.embedding_table.weight.grad
    sides[1] += (block.norm1.linear.weight.grad, theirs.transformer_blocks[0].ff.net[0].proj.bias.grad,
                 block.norm1.emb.class_embedder.embedding_table.weight.grad)
    for mine, other in zip(*sides, strict=True):
        assert (mine - other).abs().max() <= 1e-12 * other.abs().max()


def test_diffusers_with_other_embedders_is_refused(theirs):
    state = theirs.state_dict()
    name = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.bias"
    state[name] = state[name] + 1
    with pytest.raises(ValueError, match=r"load_diffusers: state wants one timestep_embedder\.linear_1\.bias in all blocks"):
        DiT(**TINY).load_diffusers(state)


@pytest.mark.parametrize("name", DiT.CONFIGS)
def test_size(size, name):
    """The published count of parameters has the position table in it, which is frozen there."""
    kind, patch = name.removeprefix("DiT-").split("/")
    millions, milliards = size(lambda: DiT.from_config(name), (4, 32, 32), None, None)
    table = (32 // int(patch))**2 * DiT.CONFIGS[name]["dim"] / 1e6
    wanted = [figures["248".index(patch)] for figures in SIZES[kind]]
    assert millions + table == pytest.approx(wanted[0], abs=0.051) and milliards == pytest.approx(wanted[1], rel=0.005, abs=0.005)


def test_size_at_512_pixels(size):
    millions, milliards = size(lambda: DiT.from_config("DiT-XL/2", size=64), (4, 64, 64), None, None)
    assert millions + 1024 * 1152 / 1e6 == pytest.approx(676, abs=0.51) and milliards == pytest.approx(524.5, abs=0.2)


def test_begins_with_zero_and_takes_any_grid():
    out = DiT(**TINY | dict(size=(4, 10)))(torch.randn(2, 4, 4, 10), torch.tensor([0.5, 7]), torch.tensor([0, 6]))
    assert out.shape == (2, 8, 4, 10) and not out.any()


def test_compiles_whole():
    model, inputs = DiT(**TINY).eval(), (torch.randn(2, 4, 8, 8), torch.tensor([3, 500]), torch.tensor([0, 7]))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0.0, 0.2)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(*inputs), model(*inputs), rtol=1e-4, atol=1e-4)


def test_refusals():
    x, t, y, model = torch.randn(2, 4, 8, 8), torch.tensor([1, 2]), torch.tensor([0, 1]), DiT(**TINY, dropout=0.0)
    for call, why in ((lambda: model(x[..., 2:], t, y), r"DiT: x wants the size \(8, 8\), got \(8, 6\)"),
                      (lambda: model(x, t[:1], y), r"DiT: t wants the shape \(B,\) = \(2,\), got \(1,\)"),
                      (lambda: model.guided(x, t, y, 1.5), "dropout wants to be above 0 for a null label, got 0"),
                      (lambda: DiT(**TINY | dict(patch=3)), r"DiT: patch wants a divisor of size = \(8, 8\), got 3"),
                      (lambda: DiT(**TINY | dict(dim=34)), "position_table: dim wants a multiple of 4, got 34"),
                      (lambda: DiT.from_config("DiT-H/2"), "DiT: from_config: name wants one of DiT-S/2, .*, got 'DiT-H/2'")):
        with pytest.raises(ValueError, match=why):
            call()
