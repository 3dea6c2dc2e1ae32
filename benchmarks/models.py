"""Whole models with random weights, forward, and forward with backward: other packages' as they are, compiled, accelerated, and both; and
those of fastdiff.models, plain and compiled, beside other packages' of the same weights or sizes.

A patched U-Net is not accelerated but built around nn.PatchedUNet.

python benchmarks/models.py [NAME ...] --threads 1,2 --pass forward,both --json FILE --quick
"""

import argparse
import copy
import importlib
import importlib.metadata
import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from fastdiff import use_backend
from fastdiff.accelerate import accelerate
from fastdiff.accelerate.measure import difference
from fastdiff.bench import memory, report, suite, timer
from fastdiff.demo import define_torchvision_operators
from fastdiff.info import versions
from fastdiff.models import ADM, RIN, DiT, Perceiver, PerceiverIO
from fastdiff.models import PatchedUNet as PatchDiffusion
from fastdiff.models.adm import MULTIPLIERS
from fastdiff.nn import PatchedUNet, sinusoid

COMPILE = dict(dynamic=False)  # options of torch.compile
# A step of a model is long beside that of an op, and the compiler takes minutes: rounds enough for a median, quickly or not.
FULL, QUICK = timer.Budget(most=60), timer.Budget(pairs=20, least=0.1, most=10)
OURS = {"accelerated": "{}", "accelerated, compiled": "{} + compile"}  # run -> op of its record


def _accelerated(model, inputs):
    fast = copy.deepcopy(model)
    return fast, accelerate(fast, inputs, show=False)


@dataclass(frozen=True)
class Model:
    """package: the distribution it comes from; None: ours, beside no other's. build() -> (module, its positional inputs). shape: its sizes,
    for the record.

    fast(module, inputs) -> (a faster one with weights of its own, the report of accelerate or None), by what op names: "models", one of
    fastdiff.models, whose parameters are others. alike: it computes the same; otherwise it has the same sizes, and is held to its own
    reference.
    """

    package: str | None
    build: Callable
    shape: dict
    fast: Callable = _accelerated
    op: str = "accelerate"
    alike: bool = True


def _perceiver():
    from perceiver_pytorch import Perceiver

    return Perceiver(num_freq_bands=64, depth=2, max_freq=224, num_latents=512, latent_dim=1024, cross_heads=1, cross_dim_head=261,
                     latent_heads=8, latent_dim_head=128), (torch.randn(1, 224, 224, 3),)


def _perceiver_io(size=224, latents=512, width=1024, layers=6):
    define_torchvision_operators()
    from transformers import PerceiverConfig, PerceiverForImageClassificationFourier

    # Without dropout: with it, training steps are the original's.
    config = PerceiverConfig(num_latents=latents, d_latents=width, num_blocks=2, num_self_attends_per_block=layers,
                             num_self_attention_heads=8, num_cross_attention_heads=1, attention_probs_dropout_prob=0.0, num_labels=1000)
    return PerceiverForImageClassificationFourier(config), (torch.randn(1, 3, size, size),)


def _labels_kept(model):
    """Without diffusers' dropout of labels in training, of which no option speaks: runs would differ by chance."""
    for block in model.transformer_blocks:
        block.norm1.emb.class_embedder.dropout_prob = 0.0
    return model


def _of(package, kind, inputs, change=lambda model: model, **options):
    """The row of another package's class, "module.Class", built with these options; inputs() -> what it is called with."""

    def build():
        define_torchvision_operators()
        module, _, name = kind.rpartition(".")
        return change(getattr(importlib.import_module(module), name)(**options)), inputs()

    return Model(package, build, options)


def _given(shape, *others):
    """Inputs: normal numbers of this shape and what follows them, of other shapes or one number per sample."""
    return lambda: (torch.randn(shape), *(torch.randn(x) if isinstance(x, tuple) else torch.full(shape[:1], x) for x in others))


def _tokens(number):
    return lambda: (torch.randint(256, (1, number)),)


def _levels(kinds, channels, **options):
    """Options of a diffusers U-Net: of each level, whether its blocks are "", "Attn", "CrossAttn" or "Resnet" ones, and its channels."""
    kinds = [k + ("{}sampleBlock2D" if k == "Resnet" else "{}Block2D") for k in kinds]
    return dict(down_block_types=tuple(k.format("Down") for k in kinds), up_block_types=tuple(k.format("Up") for k in reversed(kinds)),
                block_out_channels=channels, **options)


class _Image(torch.nn.Module):
    """A diffusers U-Net that returns the image alone."""

    def __init__(self, unet):
        super().__init__()
        self.unet = unet

    def forward(self, x, t):
        return self.unet(x, t, return_dict=False)[0]


class _Patched(torch.nn.Module):
    """A U-Net between PyTorch's own rearrangements of patches (Luhman & Luhman 2022)."""

    def __init__(self, unet, patch):
        super().__init__()
        self.unet, self.patch = unet, patch

    def forward(self, x, t):
        B, C, h, w = x.shape
        p, grid = self.patch, (h // self.patch, w // self.patch)
        y = self.unet(x.view(B, C, grid[0], p, grid[1], p).permute(0, 3, 5, 1, 2, 4).reshape(B, p * p * C, *grid), t)
        return y.view(B, p, p, C, *grid).permute(0, 3, 4, 1, 5, 2).reshape(B, C, h, w)


def _patched_unet(patch, image=64):
    """Their recipe for 256 pixels at a quarter of its width and size, attention on the coarsest grid."""

    def build():
        define_torchvision_operators()
        from diffusers import UNet2DModel

        channels = 3 * patch ** 2
        unet = UNet2DModel(**_levels(("", "", "", "Attn"), (64, 64, 128, 128), sample_size=image // patch, in_channels=channels,
                                     out_channels=channels, layers_per_block=2, attention_head_dim=64))
        return _Patched(_Image(unet), patch), (torch.randn(4, 3, image, image), torch.tensor([10, 300, 600, 990]))

    return Model("diffusers", build, dict(batch=4, image=image, patch=patch, width=64, multipliers=[1, 1, 2, 2], blocks=2),
                 fast=lambda model, _: (PatchedUNet(copy.deepcopy(model.unet), model.patch), None), op="PatchedUNet")


class _ChannelsFirst(torch.nn.Module):
    """perceiver-pytorch's Perceiver, of images (B, channels, h, w)."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, image):
        return self.model(image.movedim(1, -1))


def _channels_first():
    model, (image,) = _perceiver()
    return _ChannelsFirst(model), (image.movedim(-1, 1).contiguous(),)


def _our_perceiver_io(module, _):
    """Of its one query, as the other's."""
    return torch.nn.Sequential(PerceiverIO.from_transformers(module), torch.nn.Flatten(0, 1)).train(module.training), None


def _plain_rin(size, latents, layers):
    """rin-pytorch's, as near to the paper as its options go. It has one head width; ours are 32 of reads and writes, which are most of
    the work from many patches, and 48 of the latents' layers, which are most of it elsewhere."""
    define_torchvision_operators()
    from rin_pytorch import RIN as Other

    model = Other(dim=512, image_size=size, patch_size=8, depth=1, latent_self_attn_depth=layers, dim_latent=768, num_latents=latents - 1,
                  heads=16, dim_head=32 if size > 256 else 48, latent_token_time_cond=True, dual_patchnorm=False, patches_self_attn=False)
    return model, (torch.randn(1, 3, size, size), torch.rand(1))


def _our_rin(size, latents, layers):
    return RIN((size, size), patch=8, dim=512, latents=latents, latent_dim=768, layers=(layers,), heads=16, latent_heads=16), None


def _dit():
    define_torchvision_operators()
    from diffusers import DiTTransformer2DModel

    class Sinusoid(torch.nn.Module):
        def forward(self, t):
            return sinusoid(t, 256)

    model = DiTTransformer2DModel(num_attention_heads=6, attention_head_dim=64, in_channels=4, out_channels=8, num_layers=12,
                                  sample_size=32, patch_size=2)
    # One embedder, as the published DiT has, and its times and eps.
    embedder = model.transformer_blocks[0].norm1.emb
    embedder.time_proj, embedder.class_embedder.dropout_prob = Sinusoid(), 0.0
    for block in model.transformer_blocks:
        block.norm1.emb, block.norm3.eps = embedder, 1e-6
    return model, (torch.randn(1, 4, 32, 32), torch.tensor([500]), torch.tensor([1]))


def _our_dit(module, _):
    model = DiT.from_config("DiT-S/2")
    model.load_diffusers(module.state_dict())
    model.y_embedder.dropout = 0.0
    return model, None


class _Labelled(torch.nn.Module):
    """guided-diffusion's U-Net, with what its callers pass by name."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, t, y):
        return self.model(x, t, y=y)


def _adm(size):
    from guided_diffusion.unet import UNetModel

    config = ADM.CONFIGS[f"imagenet-{size}"]
    attention = tuple(size // feature for feature in config["attention"])
    heads = dict(num_head_channels=config["head_dim"]) if config["head_dim"] else dict(num_heads=config["heads"])
    model = UNetModel(image_size=size, in_channels=3, model_channels=config["width"], out_channels=6, num_res_blocks=config["blocks"],
                      attention_resolutions=attention, channel_mult=MULTIPLIERS[size], num_classes=1000, use_scale_shift_norm=True,
                      resblock_updown=True, use_new_attention_order=size == 64, **heads)
    return _Labelled(model), (torch.randn(1, 3, size, size), torch.tensor([500]), torch.tensor([1]))


def _our_adm(module, _):
    model = ADM.from_config("imagenet-64", dropout=0.0)
    model.load_guided_diffusion(module.model.state_dict(), heads_first=False)
    return model, None


class _Timed(torch.nn.Module):
    """RIN, called as ADM is."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, t, y):
        return self.model(x, 1 - t / 1000, y).image


def _patch_diffusion(patch):
    """The sheet's recipe, a level more for every halving of the patch, at a quarter of its width."""
    multipliers = {1: (1, 1, 1, 1, 2, 2), 2: (1, 1, 1, 2, 2), 4: (1, 1, 2, 2)}[patch]
    model = PatchDiffusion(256, patch=patch, width=64, multipliers=multipliers, blocks=2)
    return model, (torch.randn(1, 3, 256, 256), torch.tensor([500]))


MODELS = {
    "perceiver": Model("perceiver-pytorch", _perceiver, dict(pixels=224 * 224, bands=64, latents=512, width=1024, layers=2)),
    "perceiver-64": _of("perceiver-pytorch", "perceiver_pytorch.Perceiver", _given((2, 64, 64, 3)), num_freq_bands=32, depth=2, max_freq=64,
                        num_latents=128, latent_dim=256, cross_dim_head=64, latent_heads=8, latent_dim_head=32),
    "perceiver-io": Model("transformers", _perceiver_io, dict(pixels=224 * 224, bands=64, latents=512, width=1024, blocks=2)),
    "perceiver-io-64": Model("transformers", lambda: _perceiver_io(64, 128, 256, 2),
                             dict(pixels=64 * 64, bands=64, latents=128, width=256, blocks=2)),
    **{f"rin-{size}": _of("rin-pytorch", "rin_pytorch.RIN", _given((1, 3, size, size), 0.5), dim=dim, image_size=size, patch_size=8,
                          depth=depth, latent_self_attn_depth=2, dim_latent=width, num_latents=latents, heads=heads, dim_head=32)
       for size, dim, depth, width, latents, heads in ((1024, 512, 1, 768, 256, 16), (256, 256, 2, 512, 128, 8))},
    **{f"perceiver-ar-{n}": _of("perceiver-ar-pytorch", "perceiver_ar_pytorch.PerceiverAR", _tokens(n), num_tokens=256, dim=dim,
                                depth=depth, max_seq_len=n, cross_attn_seq_len=3 * n // 4, dim_head=64, heads=dim // 64)
       for n, dim, depth in ((1024, 512, 4), (4096, 256, 2))},
    **{f"hourglass-{n}": _of("hourglass-transformer-pytorch", "hourglass_transformer_pytorch.HourglassTransformerLM", _tokens(n),
                             num_tokens=256, dim=dim, max_seq_len=n, depth=depth, shorten_factor=2, heads=dim // 64)
       for n, dim, depth in ((512, 512, (2, 4, 2)), (2048, 256, (1, (1, 2, 1), 1)))},
    **{f"denoising-diffusion-{n}": _of("denoising-diffusion-pytorch", "denoising_diffusion_pytorch.Unet", _given((batch, 3, n, n), 500),
                                       dim=64, dim_mults=(1, 2, 4)) for n, batch in ((32, 4), (64, 2))},
    "unet-32": _of("diffusers", "diffusers.UNet2DModel", _given((2, 3, 32, 32), 500),
                   **_levels(("", "Attn", "", ""), (128, 256, 256, 256))),
    "unet-64": _of("diffusers", "diffusers.UNet2DModel", _given((1, 3, 64, 64), 500),
                   **_levels(("Resnet", "Resnet", "Attn"), (64, 128, 192), resnet_time_scale_shift="scale_shift")),
    **{f"conditional-unet-{n}": _of("diffusers", "diffusers.UNet2DConditionModel", _given((1, 4, n, n), 500, (1, 77, 384)), **_levels(
        ("CrossAttn", "CrossAttn", ""), channels, cross_attention_dim=384, attention_head_dim=heads))
       for n, channels, heads in ((32, (160, 320, 320), 5), (64, (64, 128, 256), 8))},
    **{f"dit-{n * n // 4}": _of("diffusers", "diffusers.DiTTransformer2DModel", _given((1, 4, n, n), 500, 1), _labels_kept,
                                num_attention_heads=6, attention_head_dim=64, num_layers=layers, sample_size=n)
       for n, layers in ((32, 6), (64, 4))},
    **{f"transformer-2d-{n}": _of("diffusers", "diffusers.Transformer2DModel", _given((1, 40 * heads, n, n), (1, 77, 768)),
                                  num_attention_heads=heads, attention_head_dim=40, in_channels=40 * heads, cross_attention_dim=768)
       for n, heads in ((16, 16), (32, 8))},
    **{f"vit-{n}": _of("timm", "timm.models.vision_transformer.VisionTransformer", _given((2, 3, n, n)), img_size=n, patch_size=16,
                       embed_dim=width, depth=4, num_heads=width // 64) for n, width in ((224, 384), (384, 768))},
    **{f"patched-unet-{patch}": _patched_unet(patch) for patch in (1, 2, 4)},
    "perceiver, ours": Model("perceiver-pytorch", _channels_first, dict(pixels=224 * 224, bands=64, latents=512, width=1024, layers=2),
                             lambda module, _: (Perceiver.from_perceiver_pytorch(module.model), None), "models"),
    "perceiver-io, ours": Model("transformers", _perceiver_io, dict(pixels=224 * 224, bands=64, latents=512, width=1024, blocks=2),
                                _our_perceiver_io, "models"),
    **{f"rin-{size}, ours": Model("rin-pytorch", lambda args=(size, latents, layers): _plain_rin(*args),
                                  dict(image=size, patch=8, dim=512, latents=latents, width=768, heads=16, blocks=1, layers=layers),
                                  lambda *_, args=(size, latents, layers): _our_rin(*args), "models", alike=False)
       for size, latents, layers in ((64, 128, 4), (128, 128, 4), (256, 256, 4), (1024, 256, 2))},
    "dit-s/2, ours": Model("diffusers", _dit, dict(tokens=256, dim=384, heads=6, blocks=12), _our_dit, "models"),
    "adm-64, ours": Model("guided-diffusion-sdk", lambda: _adm(64), dict(image=64, width=192, blocks=3), _our_adm, "models"),
    # A sampling step of RIN beside one of ADM without a classifier. gflop: 2 per multiply-add; the published one is of the paper's sizes.
    **{f"rin-{size}, beside adm": Model("guided-diffusion-sdk", lambda size=size: _adm(size),
                                        dict(image=size, gflop=ours, adm_gflop=theirs, published_rin_gflop=published),
                                        lambda *_, name=name: (_Timed(RIN.from_config(name)), None), "models", alike=False)
       for size, name, ours, theirs, published in ((64, "imagenet-64", 39, 219, 106), (128, "noise-schedule-128", 88, 614, 194),
                                                   (256, "noise-schedule-256", 205, 2240, 334))},
    # published_gmac: of the sheet's width, 256; their ratios are those of the work here.
    **{f"patch-diffusion-{p}, ours": Model(None, lambda p=p: _patch_diffusion(p), dict(image=256, patch=p, width=64, published_gmac=gmac),
                                           lambda model, _: (model, None), "models", alike=False)
       for p, gmac in ((1, 859), (2, 224), (4, 65.8))},
}


def _random(model):
    """Parameters that start at 0 drawn anew, so that every part of the model reaches the output."""
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():
                p.normal_(0.0, 0.02)
    return model


def _step(model, inputs, weights, pass_):
    """(output,), and after it the gradients of sum(weights * output) where pass_ is "both": of the first input if it wants one, of all
    parameters.
    """
    if pass_ == "forward":
        with torch.no_grad():
            return (_first(model(*inputs)),)
    wanted = [x for x in (inputs[0], *model.parameters()) if x.requires_grad]
    out = _first(model(*inputs))
    grads = torch.autograd.grad((out * weights).sum(), wanted, allow_unused=True)
    return (out.detach(), *(g for g in grads if g is not None))


def _first(out):
    return out if isinstance(out, torch.Tensor) else out[0]


def measure(name, pass_, threads, budget, notes):
    """The records of one model and pass at torch's present number of threads. Raises suite.Wrong where a result of ours differs."""
    torch.manual_seed(0)
    case = MODELS[name]
    model, inputs = case.build()
    _random(model).train(pass_ == "both")
    fast, swapped = case.fast(model, inputs)
    checked = None
    if case.op == "models":
        checked = 2  # the output and the first input's gradient
        inputs[0].requires_grad_(pass_ == "both")
        (fast if case.alike else _random(fast)).train(pass_ == "both")
    with torch.no_grad():
        weights = torch.randn_like(_first(model(*inputs)))
    modules = {"eager": model, "compile": torch.compile(model, **COMPILE)} if case.package else {}
    modules |= {"accelerated": fast, "accelerated, compiled": torch.compile(fast, **COMPILE)}
    runs = {run: lambda _, m=m: _step(m, inputs, weights, pass_) for run, m in modules.items()}
    with use_backend(None if case.alike else "reference"):
        plain = runs["eager" if case.alike else "accelerated"](0)[:checked]
    for run in list(runs)[1:] if case.alike else OURS:
        try:
            suite.same(run, runs[run](0)[:checked], plain, "float32")
        except Exception as failure:
            # A compiler may fail in any way: a note on the compiled runs. Where it fails on the plain model, it may on ours too.
            compiles = "compile" in runs or not case.package
            if run == "accelerated" or (run in OURS and compiles and isinstance(failure, suite.Wrong)):
                raise
            notes.append(f"{name}, {pass_}: {run} left out: {(str(failure).strip().splitlines() or [type(failure).__name__])[0]}")
            del runs[run]
    samples = timer.interleave(runs, budget)
    peers = {run: times for run, times in samples.items() if run not in OURS}
    records = []
    for run, op in OURS.items():
        if run not in runs:
            continue
        times = timer.compare({"ours": samples[run], **peers})
        peak, after = memory.peak(lambda run=run: runs[run](0), "cpu")
        suite.same(run, after[:checked], plain, "float32")
        records.append({
            "op": op.format(case.op), "case": name, "dtype": "float32", "pass": pass_, "device": "cpu", "threads": threads,
            "backend": f"{len(swapped.replaced)} modules" if swapped else "ops", "shape": case.shape, **times, "floor_ms": None,
            "of_floor": None, "peak_bytes": peak,
            "peer_peak_bytes": memory.peak(lambda best=times["best_peer"]: runs[best](0), "cpu")[0] if peers else None,
            "error": difference(plain, after[:checked])[1], "error_limit": suite.PEER_ERROR["float32"]})
    return records


def run(names, *, threads, passes, quick, command, progress=lambda text: None):
    """(document, notes): the document is that of `python -m fastdiff bench`."""
    records, failures, notes, packages = [], [], [], {}
    before = torch.get_num_threads()
    try:
        for n in threads:
            torch.set_num_threads(n)
            for name in names:
                for pass_ in passes:
                    progress(f"{name}, {pass_}, {n} threads")
                    torch.compiler.reset()  # compiled code is for one number of threads
                    try:
                        records += measure(name, pass_, n, QUICK if quick else FULL, notes)
                        if package := MODELS[name].package:
                            packages[package] = importlib.metadata.version(package)
                    except ImportError as missing:
                        notes.append(f"{name}: not run, {missing}; to run it: pip install {MODELS[name].package}")
                    except suite.Wrong as wrong:
                        failures.append({"op": MODELS[name].op, "case": name, "dtype": "float32", "pass": pass_, "device": "cpu",
                                         "threads": n, "reason": str(wrong)})
    finally:
        torch.set_num_threads(before)
    made = suite.document(command, versions() | packages, [], records)
    return made | ({"failures": failures} if failures else {}), list(dict.fromkeys(notes))


def main(argv):
    """Runs the command; returns 1 when a result was wrong."""
    parser = argparse.ArgumentParser("python benchmarks/models.py", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"all unless given: {', '.join(MODELS)}")
    parser.add_argument("--threads", type=suite.split(kind=int), metavar="N[,N]", help="torch's number of threads unless given")
    parser.add_argument("--pass", dest="passes", type=suite.split(suite.PASSES), default=["forward"], metavar="forward|both",
                        help="both: and backward")
    parser.add_argument("--json", metavar="FILE", help="write everything measured")
    parser.add_argument("--quick", action="store_true", help="short times")
    options = parser.parse_args(argv)
    if unknown := [name for name in options.names if name not in MODELS]:
        parser.error(f"unknown model {', '.join(unknown)}; there are {', '.join(MODELS)}")
    console, bar = report.console(), report.console(stderr=True)
    with bar.status("") as status:
        document, notes = run(options.names or list(MODELS), threads=options.threads or [torch.get_num_threads()], passes=options.passes,
                              quick=options.quick, command=shlex.join(["python", "benchmarks/models.py", *argv]), progress=status.update)
    if document["records"]:
        console.print(report.table(document["records"]))
    for note in notes:
        console.print(f"note: {note}", style="dim")
    for failure in document.get("failures", []):
        console.print(f"FAILED {failure['case']}, {failure['pass']}, {failure['threads']} threads: {failure['reason']}", style="red")
    if options.json:
        Path(options.json).write_text(json.dumps(document, indent=1) + "\n")
    return 1 if "failures" in document else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
