"""Behind `python -m fastdiff train`: a model trained on scikit-learn's digits or on a folder of images, its samples drawn and judged.

The same command again goes on from its last checkpoint, to the bit.
"""

import argparse
import copy
import hashlib
import signal
import time
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from . import checkpoint
from .bench.report import console as terminal
from .core.backend import use_backend
from .core.check import fail
from .presets import PRESETS

TRAINED = 1297  # of the 1,797 digits; the others are held out
BATCH, EMA, WARMUP, CLIP = 64, 0.999, 100, 1.0
SURE = 0.9


class Data(NamedTuple):
    """Images (N, channels, size, size) uint8 of values 0 to `most`; labels (N,) int64, or None, of so many classes."""

    images: torch.Tensor
    labels: torch.Tensor | None
    most: int
    classes: int

    def digest(self):
        seen = hashlib.sha256(f"{tuple(self.images.shape)} {self.most}".encode())
        for x in filter(lambda x: x is not None, (self.images, self.labels)):
            seen.update(x.contiguous().numpy())
        return seen.hexdigest()


def digits():
    """scikit-learn's digits, 8x8 of values 0 to 16: (those trained on, those held out)."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    images, labels = torch.tensor(found.images).to(torch.uint8).unsqueeze(1)[order], torch.tensor(found.target)[order]
    return Data(images[:TRAINED], labels[:TRAINED], 16, 10), Data(images[TRAINED:], labels[TRAINED:], 16, 10)


def folder(path, size):
    """The images below a folder, their middle squares at size x size; its folders are the classes, if all images are in one."""
    endings = set(Image.registered_extensions())
    files = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix.lower() in endings)
    if not files:
        fail("train", f"--data wants a folder with images, got {path}")
    images = []
    for file in files:
        try:
            with Image.open(file) as image:
                image = image.convert("RGB")
        except OSError as error:
            fail("train", f"--data: {file} does not open as an image: {error}")
        side = min(image.size)
        left, top = ((n - side) // 2 for n in image.size)
        images.append(np.asarray(image.resize((size, size), Image.Resampling.LANCZOS, (left, top, left + side, top + side))))
    images = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    parts = [file.relative_to(path).parts for file in files]
    if not all(len(p) > 1 for p in parts):
        return Data(images, None, 255, 0)
    names = sorted({p[0] for p in parts})
    return Data(images, torch.tensor([names.index(p[0]) for p in parts]), 255, len(names))


class Run:
    """A model in training: what a checkpoint holds, and a step.

    All that is random comes of one generator: the first weights, the order of the data, times, noise.
    """

    def __init__(self, name, data, *, seed=0, batch=BATCH, rate=None, device="cpu"):
        if batch > len(data.images):
            fail("train", f"--batch wants at most the {len(data.images)} images there are, got {batch}")
        kind = PRESETS[name]
        self.settings = dict(preset=name, data=data.digest(), seed=seed, batch=batch, rate=rate or kind.rate)
        self.data, self.batch, self.device = data, batch, device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.preset = kind(data.images.shape[1], data.images.shape[2], data.most, data.classes)
        self.model = self.preset.model.to(device)
        self.ema = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), self.settings["rate"], betas=(0.9, 0.99), weight_decay=0.01)
        self.generator = torch.Generator().manual_seed(seed)
        self.order = torch.empty(0, dtype=torch.int64)
        self.losses = []

    @property
    def step(self):
        """Steps done."""
        return len(self.losses)

    def advance(self):
        """One step of training; its loss."""
        at = self.step % (len(self.data.images) // self.batch) * self.batch
        if at == 0:
            self.order = torch.randperm(len(self.data.images), generator=self.generator)
        rows = self.order[at:at + self.batch]
        y = None if self.data.labels is None else self.data.labels[rows].to(self.device)
        self.optimizer.param_groups[0]["lr"] = self.settings["rate"] * min(1.0, (self.step + 1) / WARMUP)
        self.optimizer.zero_grad()
        loss = self.preset.loss(self.model, self.data.images[rows].to(self.device), y, self.generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        decay = min(EMA, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.model.parameters()), 1 - decay)
        self.losses.append(loss.item())
        return self.losses[-1]

    def save(self, path):
        tensors = {f"model.{k}": x for k, x in self.model.state_dict().items()}
        tensors |= {f"ema.{k}": x for k, x in self.ema.state_dict().items()}
        tensors |= {f"optimizer.{i}.{k}": x for i, s in self.optimizer.state_dict()["state"].items() for k, x in s.items()}
        tensors |= {"generator": self.generator.get_state(), "order": self.order,
                    "losses": torch.tensor(self.losses, dtype=torch.float64)}
        checkpoint.write(path, tensors, self.settings)

    def load(self, path):
        """Raises ValueError, naming the file, if it is damaged or of a run with other settings."""
        tensors, settings = checkpoint.read(path)
        if settings != self.settings:
            other = ", ".join(f"{k} {settings.get(k)!r}, not {mine!r}" for k, mine in self.settings.items() if settings.get(k) != mine)
            fail("train", f"{path} is of another run: {other}; --output chooses another folder, --restart begins anew")
        parts = {"model": {}, "ema": {}, "optimizer": {}}
        for name, x in tensors.items():
            part, _, key = name.partition(".")
            if key:
                parts[part][key] = x
        state = {}
        for key, x in parts["optimizer"].items():
            i, _, key = key.partition(".")
            state.setdefault(int(i), {})[key] = x
        self.model.load_state_dict(parts["model"])
        self.ema.load_state_dict(parts["ema"])
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})
        self.generator.set_state(tensors["generator"])
        self.order, self.losses = tensors["order"], tensors["losses"].tolist()

    def sample(self, count, weight, seed):
        """(images (count, channels, size, size) uint8, their classes in turn or None) of the averaged model."""
        y = torch.arange(count, device=self.device) % self.data.classes if self.data.classes else None
        generator = torch.Generator().manual_seed(seed)
        return self.preset.sample(self.ema.eval(), count, y, weight, self.device, generator).cpu(), None if y is None else y.cpu()


class Judge:
    """Support vector machines fitted on real images, one per class against the rest, each with a probability of its own (Platt 1999).

    The probabilities need not add up to 1: of what looks like no class, all are small.
    """

    def __init__(self, data):
        from sklearn.calibration import CalibratedClassifierCV
        from sklearn.svm import SVC

        self.most = data.most
        self.machines = [CalibratedClassifierCV(SVC(C=10), ensemble=False).fit(self._flat(data.images), data.labels.numpy() == k)
                         for k in range(data.classes)]

    def _flat(self, images):
        return images.flatten(1).double().numpy() / self.most

    def __call__(self, images, labels):
        """Shares of the images with a probability above 0.9: of any class, and of their own."""
        p = torch.tensor(np.stack([m.predict_proba(self._flat(images))[:, 1] for m in self.machines], 1))
        sure = p.amax(1) > SURE
        return sure.double().mean().item(), (sure & (p.argmax(1) == labels)).double().mean().item()


def write_grid(images, most, path, columns=10):
    """A PNG of up to 100 images (N, channels, size, size), at least 32 pixels each, row by row."""
    images = images[:columns * columns]
    size = images.shape[-1]
    scale, gap = max(1, -(-32 // size)), 2
    side, rows = size * scale, -(-len(images) // columns)
    whole = Image.new("RGB", (columns * (side + gap) - gap, rows * (side + gap) - gap), "white")
    for i, image in enumerate(images):
        tile = (image.float() * (255 / most)).round().byte().expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()
        whole.paste(Image.fromarray(tile).resize((side, side), Image.Resampling.NEAREST),
                    (i % columns * (side + gap), i // columns * (side + gap)))
    whole.save(path, optimize=True)


@contextmanager
def _held():
    """Ctrl-C within the block comes after it: () -> whether it came."""
    came = []
    try:
        before = signal.signal(signal.SIGINT, lambda *_: came.append(True))
    except ValueError:  # not the main thread
        yield lambda: False
        return
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGINT, before)


def train(run, steps, path, every, console):
    """Trains to `steps` steps in all, a checkpoint each `every`; False if Ctrl-C ended it, after one more."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]}"),
               TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar, _held() as stopped:
        task = bar.add_task(run.settings["preset"], total=steps, completed=run.step, loss="-")
        while run.step < steps:
            run.advance()
            recent = run.losses[-100:]
            bar.update(task, completed=run.step, loss=f"{sum(recent) / len(recent):.4f}")
            if run.step % every == 0 or run.step == steps or stopped():
                run.save(path)
                console.print(f"step {run.step}: loss {sum(recent) / len(recent):.4f} (mean of {len(recent)})")
            if stopped():
                return run.step == steps
    return True


def _options(argv):
    parser = argparse.ArgumentParser("python -m fastdiff train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def whole(text):
        number = int(text)
        if number < 1:
            raise argparse.ArgumentTypeError(f"wants at least 1, got {number}")
        return number

    def positive(text):
        number = float(text)
        if not 0 < number < float("inf"):
            raise argparse.ArgumentTypeError(f"wants a number above 0, got {text}")
        return number

    add = parser.add_argument
    add("preset", choices=PRESETS, metavar="PRESET", help=", ".join(PRESETS))
    add("--data", type=Path, metavar="FOLDER", help="of images; folders in it are classes (default: scikit-learn's digits)")
    add("--size", type=whole, default=32, metavar="PIXELS", help="of the images of --data: a power of two (default: %(default)s)")
    add("--steps", type=whole, metavar="N", help="of training in all (default: the preset's)")
    add("--batch", type=whole, default=BATCH, metavar="N", help="images per step (default: %(default)s)")
    add("--rate", type=positive, help="of learning (default: the preset's)")
    add("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    add("--every", type=whole, default=100, metavar="N", help="steps between checkpoints (default: %(default)s)")
    add("--samples", type=whole, default=500, metavar="N", help="drawn at the end (default: %(default)s)")
    add("--guidance", type=positive, default=1.5, metavar="WEIGHT", help="of the samples' classes, 1 for none (default: %(default)s)")
    add("--backend", choices=("cpu", "cuda", "triton", "reference"), help="for every op (default: the ops choose)")
    add("--device", default="cpu", choices=("cpu", "cuda"), help="default: %(default)s")
    add("--output", type=Path, metavar="FOLDER", help="for checkpoint.safetensors and samples.png (default: train-output/PRESET)")
    add("--restart", action="store_true", help="from the first step, though there is a checkpoint")
    options = parser.parse_args(argv)
    if options.size < 8 or options.size & (options.size - 1):
        parser.error(f"--size wants a power of two of at least 8, got {options.size}")
    if options.data is not None and not options.data.is_dir():
        parser.error(f"--data wants a folder, got {options.data}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    return options


def main(argv):
    """Trains, draws and judges; returns 1 for data or a checkpoint that cannot be used, 130 when Ctrl-C ended it."""
    options, console = _options(argv), terminal()
    try:
        return _main(options, console)
    except ValueError as error:
        console.print(str(error), style="red", markup=False, soft_wrap=True)
        return 1
    except ModuleNotFoundError as error:
        if error.name != "sklearn":
            raise
        console.print("the digits need scikit-learn: pip install 'fastdiff-kernels[train]', or --data FOLDER", markup=False, soft_wrap=True)
        return 2


def _main(options, console):
    data, held_out = digits() if options.data is None else (folder(options.data, options.size), None)
    run = Run(options.preset, data, seed=options.seed, batch=options.batch, rate=options.rate, device=options.device)
    output = options.output or Path("train-output") / options.preset
    output.mkdir(parents=True, exist_ok=True)
    path = output / "checkpoint.safetensors"
    if path.exists() and not options.restart:
        run.load(path)
        console.print(f"{path}: goes on from step {run.step}", soft_wrap=True)
    parameters = sum(p.numel() for p in run.model.parameters())
    console.print(f"{options.preset}: {parameters:,} parameters, {len(data.images):,} images of {run.preset.image}, "
                  f"{data.classes} classes, {torch.get_num_threads()} threads", soft_wrap=True)
    start, steps = time.perf_counter(), options.steps or run.preset.steps
    first = run.step
    with use_backend(options.backend):
        if not train(run, steps, path, options.every, console):
            console.print(f"stopped at step {run.step}; the same command goes on from there")
            return 130
        seconds, start = time.perf_counter() - start, time.perf_counter()
        images, labels = run.sample(options.samples, options.guidance, options.seed)
    console.print(f"{run.step - first} steps in {seconds:.0f} s, {len(images)} samples in {time.perf_counter() - start:.0f} s")
    write_grid(images, data.most, output / "samples.png")
    console.print(f"samples: {output / 'samples.png'}", soft_wrap=True)
    if held_out is not None:
        judge = Judge(data)
        for name, shares in (("samples", judge(images, labels)), ("held-out real digits", judge(held_out.images, held_out.labels))):
            console.print(f"{name}: {shares[0]:.1%} recognised with a probability above {SURE}, {shares[1]:.1%} as what they should be")
    return 0
