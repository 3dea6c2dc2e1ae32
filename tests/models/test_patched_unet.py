"""The patched U-Net against PatchDiffusion-Pytorch's results, and the sheet's sizes."""

import pytest
import torch

from fastdiff import ops
from fastdiff.models import PatchedUNet, adm, patched_unet

# name -> the program's own errors in float32: of outputs, of gradients
PUBLISHED = {"patched_unet_p1": (1.1e-6, 6.6e-6), "patched_unet_p2": (5.5e-7, 1.7e-6), "patched_unet_p4": (1.3e-6, 4.1e-6)}
# name -> millions of parameters, milliards of multiply-adds of a pass over one image
SIZES = {"ffhq-1024": (162.6, 419.5), "imagenet-256": (202.1, 125.1), "lsun-256-p2": (122.9, 104.2), "lsun-256-p4": (121.4, 65.8),
         "lsun-256-p8": (121.0, 27.5)}
# One recipe at four patches: a level more for every halving of the patch.
RECIPE = {1: ((1, 1, 1, 1, 2, 2), 142, 859), 2: ((1, 1, 1, 2, 2), 132, 224), 4: ((1, 1, 2, 2), 121, 65.8), 8: ((1, 2, 2), 112, 26.1)}
TINY = dict(image_size=16, patch=2, width=32, multipliers=(1, 2), blocks=1, attention=(4,), head_dim=16)


def load(file, dtype):
    """The model of a golden file, and whether its attention's rows are ordered by head."""
    c, heads_first = file.config, not file.config["use_new_attention_order"]
    fixed, grid = c["num_head_channels"] == -1, c["image_size"] // c["patch_size"]
    model = PatchedUNet(c["image_size"], patch=c["patch_size"], width=c["model_channels"], multipliers=c["channel_mult"],
                        blocks=c["num_res_blocks"], attention=[grid // rate for rate in c["attention_resolutions"]],
                        heads=c["num_heads"] if fixed else None, head_dim=None if fixed else c["num_head_channels"],
                        classes=c["num_classes"], null=c["classifier_free"], variance=c["out_channels"] == 2 * c["in_channels"])
    model.load_patch_diffusion(file.weights, heads_first=heads_first)
    return model.to(dtype).eval(), heads_first


@pytest.mark.parametrize("name", PUBLISHED)
def test_equals_patch_diffusion(golden, held, name):
    file, (outputs, grads) = golden(name), PUBLISHED[name]
    model, heads_first = load(file, held.dtype)
    x = file["in/x"].to(held.dtype).requires_grad_()
    out = model(x, file["in/t"], file.tensors.get("in/y"))
    (out * file["cot/main/out"].to(held.dtype)).sum().backward()
    held.outputs(outputs, out=(out, file["out/main/out"]))
    wanted = adm.renamed(model, file.under("grad/main/weights/"), patched_unet.NAMES, heads_first)
    held.gradients(grads, {"x": (x.grad, file["grad/main/x"])}
                   | {name: (model.get_parameter(name).grad, value) for name, value in wanted.items()})


@pytest.mark.parametrize("name", PUBLISHED)
def test_layout_and_position_code(golden, name):
    file = golden(name)
    patches = ops.space_to_depth(file["in/layout/image"], file.config["patch_size"])
    assert torch.equal(patches, file["out/layout/patches"])
    code = file["mid/position_code"]
    torch.testing.assert_close(patched_unet.position_code(code.shape[1], code.shape[2:], code), code, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", PatchedUNet.CONFIGS)
def test_size(size, name):
    options = PatchedUNet.CONFIGS[name]
    image, labels = (3, options["image_size"], options["image_size"]), [None] * ("classes" in options)
    assert size(lambda: PatchedUNet.from_config(name), image, None, *labels) == pytest.approx(SIZES[name], abs=0.051)


@pytest.mark.parametrize("patch", RECIPE)
def test_size_of_one_recipe_at_four_patches(size, patch):
    multipliers, *wanted = RECIPE[patch]
    made = size(lambda: PatchedUNet(256, patch=patch, width=256, multipliers=multipliers, blocks=2), (3, 256, 256), None)
    assert made == pytest.approx(wanted, abs=0.5)


def test_variance_head_trains_itself_and_the_time_alone():
    model = PatchedUNet(**TINY, classes=3)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0.0, 0.1)
    x = torch.randn(1, 3, 16, 24, requires_grad=True)
    model(x, torch.tensor([40]), torch.tensor([3]))[:, 3:].sum().backward()
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained == {"variance", "time_embed"} and not x.grad.any()


@pytest.mark.parametrize("resample", ["same", "residual"])
def test_begins_with_zero(resample):
    out = PatchedUNet(**TINY, resample=resample)(torch.randn(1, 3, 16, 16), torch.tensor([40]))
    assert out.shape == (1, 6, 16, 16) and not out[:, :3].any() and (out[:, 3:] > 0).all() and (out[:, 3:] < 1).all()


def test_refusals():
    x, t, model = torch.randn(2, 3, 16, 16), torch.tensor([1, 2]), PatchedUNet(**TINY)
    for call, why in ((lambda: model(x, t, t), "PatchedUNet: y wants None for this model, got a tensor"),
                      (lambda: model(x, t[0]), r"PatchedUNet: t wants the shape \(B,\) = \(2,\), got \(\)"),
                      (lambda: model(x[..., 1:], t), "patch wants divisors of the image size"),
                      (lambda: model(x[..., 2:], t), r"PatchedUNet: x wants a grid that 2 divides, got \(8, 7\)"),
                      (lambda: PatchedUNet(**TINY | dict(multipliers=(2, 2))), "multipliers wants to begin with 1 beside a variance head"),
                      (lambda: PatchedUNet.from_config("lsun"), "PatchedUNet: from_config: name wants one of ffhq-1024, .*, got 'lsun'")):
        with pytest.raises(ValueError, match=why):
            call()
