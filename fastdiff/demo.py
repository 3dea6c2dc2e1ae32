"""Behind `python -m fastdiff demo`: public models on a real photograph, plain, accelerated and compiled; the photograph under the forward
processes and back; the ops against PyTorch."""

import argparse
import copy
import importlib.util
import signal
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from . import info
from .accelerate import accelerate
from .accelerate.measure import difference
from .bench import report, suite
from .bench.timer import Budget, interleave
from .diffusion import BlurringDiffusion, InverseHeat

INSTALL = "pip install rin-pytorch perceiver-pytorch scikit-learn pillow"
BUDGET = Budget(pairs=20, least=1.0, most=4.0, fewest=5)
OPS = ("attention", "fourier_cross_attend", "patchify", "unpatchify")  # the microbenchmark of a minute
STEPS, COLUMNS, SIDE = 100, 6, 96  # of the sheet: states made by each process, those shown, and their size
_LIBRARIES = []  # operators stay defined as long as their library object lives


def define_torchvision_operators():
    """Lets torchvision's Python part be imported without its compiled part, as rin-pytorch wants: it names these operators at import.

    They are declared without a kernel, and only when torchvision fails to import.
    """
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _LIBRARIES.append(library)


def photograph(size):
    """scikit-learn's photograph of a Chinese temple, its middle square at size x size: (1, 3, size, size) in [-1, 1]."""
    from sklearn.datasets import load_sample_image

    image = torch.tensor(load_sample_image("china.jpg")).permute(2, 0, 1)[None].float() / 127.5 - 1
    side = min(image.shape[2:])
    top, left = ((n - side) // 2 for n in image.shape[2:])
    return F.interpolate(image[..., top:top + side, left:left + side], (size, size), mode="bilinear", antialias=True)


def rin():
    """(model, its inputs, the modules that repeat): RIN on the photograph with half its variance noise."""
    define_torchvision_operators()
    from rin_pytorch import RIN

    model = RIN(dim=256, image_size=128, patch_size=4, depth=2, latent_self_attn_depth=2, dim_latent=512, num_latents=128, heads=16,
                dim_head=32)
    return model, (0.5 ** 0.5 * (photograph(128) + torch.randn(1, 3, 128, 128)), torch.tensor([0.5])), model.blocks


def perceiver():
    """(model, its inputs, the modules that repeat): a Perceiver on all 50,176 pixels of the photograph."""
    from perceiver_pytorch import Perceiver

    model = Perceiver(num_freq_bands=64, depth=1, max_freq=224, num_latents=512, latent_dim=512, self_per_cross_attn=6)
    return model, (photograph(224).permute(0, 2, 3, 1).contiguous(),), model.layers


MODELS = {"RIN 128x128, 128 latents of 1,024 patches": rin, "Perceiver 224x224, 512 latents of 50,176 pixels": perceiver}


class Expired(Exception):
    """Compilation took longer than it may."""


@contextmanager
def _deadline(seconds):
    """Raises Expired in the block after so many seconds (None: never) and each second after that; on the main thread only."""
    if seconds is None or threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def expire(*_):
        raise Expired

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _compiled(model, inputs, repeated, seconds):
    """(model with torch.compile on the modules that repeat, seconds it took) or (None, why not)."""
    import torch._inductor.config as inductor

    for m in repeated:
        m.compile()
    start = time.perf_counter()
    try:
        # One compiler at a time: those of a pool would go on in the background when the time is over.
        with inductor.patch(compile_threads=1 if seconds else inductor.compile_threads), _deadline(seconds):
            model(*inputs)
    except Exception as failure:  # whatever a compiler may raise is the row's content
        torch.compiler.reset()
        spent = time.perf_counter() - start
        if seconds and spent >= seconds:
            return None, f"not compiled within {seconds:g} s (run once with --prepare)"
        lines = str(failure).strip().splitlines() or [type(failure).__name__]
        return None, f"not compiled: {' '.join(lines[:2])[:160]}"
    return model, time.perf_counter() - start


def _prepare(console):
    """Compiles the models without a limit, which fills torch's cache on disk for the demo."""
    for name, build in MODELS.items():
        try:
            model, inputs, repeated = build()
        except ImportError as missing:
            console.print(f"{name}: not compiled, {missing}; to run it: {INSTALL}")
            continue
        with console.status(f"{name}: torch.compile"), torch.no_grad():
            done, outcome = _compiled(model.eval(), inputs, repeated, None)
        console.print(f"{name}: {f'compiled in {outcome:.0f} s' if done else outcome}")


def _exact(model, inputs):
    """The plain model's output in float64; RIN makes its positions in the default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return copy.deepcopy(model).double()(*(x.double() for x in inputs))
    finally:
        torch.set_default_dtype(before)


def compare(build, limit, step):
    """Runs a model plain, accelerated and compiled: (rows of texts, sentence on what was replaced, whether the output is right)."""
    torch.manual_seed(0)
    step("building")
    model, inputs, repeated = build()
    model.eval()
    step("accelerating")
    fast = copy.deepcopy(model)
    swapped = accelerate(fast, show=False)
    exact = _exact(model, inputs)
    step(f"torch.compile, at most {limit:g} s")
    runs = {"plain": model, "accelerated": fast}
    compiled, outcome = _compiled(*copy.deepcopy((model, inputs, repeated)), limit)
    if compiled:
        runs["compiled"] = compiled
    step("timing")
    errors = {name: difference(exact, m(*inputs)) for name, m in runs.items()}
    samples = interleave({name: lambda _, m=m: m(*inputs) for name, m in runs.items()}, BUDGET)
    rows = []
    for name, times in samples.items():
        rows.append((name, f"{1e3 * median(times):.0f}", f"{median(samples['plain']) / median(times):.2f}",
                     f"{errors[name][0]:.1e}", f"{errors[name][1]:.1e}", f"{outcome:.0f}" if name == "compiled" else ""))
    if not compiled:
        rows.append(("compiled", "-", "-", "-", "-", outcome))
    left = {row.kind.rpartition(".")[2]: row.reason for row in swapped.kept if row.reason != "no rule"}
    parts = [f"{len(swapped.replaced)} modules replaced", *(f"{kind} left alone ({reason})" for kind, reason in left.items())]
    rounding = torch.finfo(torch.float32).eps
    return rows, "; ".join(parts), errors["accelerated"][1] <= 2 * errors["plain"][1] + rounding


def _models(console, limit):
    """Prints the table of models; returns whether every output was right."""
    table = Table("model", "run", title=f"one forward on a photograph, {torch.get_num_threads()} threads, float32", title_justify="left")
    for header in ("ms", "ratio to plain", "max error", "relative", "compile s"):
        table.add_column(header, justify="right")
    notes, right = [], True
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as bar, torch.no_grad():
        task = bar.add_task("", total=4 * len(MODELS))
        for at, (name, build) in enumerate(MODELS.items()):
            done = iter(range(4 * at, 4 * at + 4))

            def step(text, done=done, name=name):
                bar.update(task, completed=next(done), description=f"{name}: {text}")

            try:
                rows, sentence, good = compare(build, limit, step)
            except ImportError as missing:
                notes.append(f"{name}: not run, {missing}; to run it: {INSTALL}")
                continue
            for i, row in enumerate(rows):
                table.add_row(name if i == 0 else "", *row, end_section=i == len(rows) - 1)
            notes.append(f"{name}: {sentence}")
            if not good:
                right = False
                notes.append(f"{name}: WRONG, the accelerated output is off by more than twice the plain one")
    if table.rows:
        console.print(table)
        console.print("error: against the plain model in float64; relative to its largest value. compiled: torch.compile on each block")
    for note in notes:
        console.print(note)
    return right


def _there_and_back(process, x):
    """States (x_0, ..., x_1) at equal times of a BlurringDiffusion: diffused from images x, and drawn back from the last given x."""
    noise, times = torch.randn_like(x), torch.linspace(0, 1, STEPS + 1)
    forward = [process.diffuse(x, noise, t.expand(len(x))) for t in times]
    back = []

    def knows(z, t):
        back.append(z)
        return x

    return forward, [process.sample(knows, forward[-1], STEPS, prediction="x"), *reversed(back)]


def _heat(x):
    """The same for inverse heat dissipation, whose images are in [0, 1], with a network that knows x."""
    heat, back = InverseHeat(levels=STEPS), []
    level = lambda k: heat.blur(x, torch.full(x.shape[:1], k))

    def knows(u, k):
        back.append(u)
        return level(k[0].item() - 1) - u

    return [level(k) for k in range(STEPS + 1)], [heat.sample(knows, level(STEPS)), *reversed(back)]


def _rows(title, paths):
    at = torch.linspace(0, STEPS, COLUMNS).round().int().tolist()
    return [(f"{title}, {way}", [path[i] for i in at]) for way, path in zip(("t from 0 to 1", "back from 1 to 0"), paths, strict=True)]


def sheet(size):
    """(rows of (title, COLUMNS images in [0, 1]), [(process, largest distance from the photograph after coming back, what it may be)]).

    The two diffusions keep the noise of t = 0: six of its standard deviations, halved with the images.
    """
    torch.manual_seed(0)
    x, rows, worst = photograph(size), [], []
    pixels = x / 2 + 0.5
    for title, process in (("Gaussian", BlurringDiffusion(max_width=0.0)), ("blurring", BlurringDiffusion())):
        paths = [[z / 2 + 0.5 for z in path] for path in _there_and_back(process, x)]
        rows += _rows(title, paths)
        worst.append((title, (paths[1][0] - pixels).abs().max().item(), 3 * process.scales(torch.zeros(()))[1].item()))
    paths = _heat(pixels)
    rows += _rows("heat", paths)
    worst.append(("heat", (paths[1][0] - pixels).abs().max().item(), 1e-5))
    return rows, worst


def write_sheet(rows, path):
    """A PNG with a row of images per title, of 256 colours: noise does not compress."""
    from PIL import Image, ImageDraw

    gap, head = 4, 14
    side = rows[0][1][0].shape[-1]
    whole = Image.new("RGB", (COLUMNS * (side + gap) - gap, len(rows) * (side + head)), "white")
    for r, (title, images) in enumerate(rows):
        ImageDraw.Draw(whole).text((1, r * (side + head) + 1), title, "black")
        for c, image in enumerate(images):
            tile = image[0].clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).contiguous().numpy()
            whole.paste(Image.fromarray(tile), (c * (side + gap), r * (side + head) + head))
    whole.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def _pictures(console, folder):
    """Writes the contact sheet; returns whether every process came back to the photograph."""
    try:
        rows, worst = sheet(SIDE)
        folder.mkdir(parents=True, exist_ok=True)
        write_sheet(rows, folder / "processes.png")
    except ImportError as missing:
        console.print(f"no contact sheet, {missing}; to make it: {INSTALL}")
        return True
    console.print(f"\nthe photograph under three forward processes, and back in {STEPS} steps of the exact posterior given it (heat: of a "
                  f"network that knows it): {folder / 'processes.png'}")
    found = ", ".join(f"{title} {off:.1e} (wanted: {limit:.0e})" for title, off, limit in worst)
    console.print(f"largest distance after coming back: {found}")
    return all(off <= limit for _, off, limit in worst)


def _ops(console, folder):
    """Runs the quick benchmark, which prints its table; returns whether every result was right."""
    console.print(f"\nthe ops against PyTorch (python -m fastdiff bench {' '.join(OPS)} --quick)")
    if importlib.util.find_spec("matplotlib") is None:
        console.print("no roofline picture: pip install matplotlib")
        return suite.main([*OPS, "--quick"]) == 0
    folder.mkdir(parents=True, exist_ok=True)
    picture = folder / "roofline.png"
    right = suite.main([*OPS, "--quick", "--plot", str(picture)]) == 0
    console.print(f"roofline picture: {picture}")
    return right


def main(argv):
    """Runs the demo; returns 1 when an output was wrong."""
    parser = argparse.ArgumentParser("python -m fastdiff demo", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("demo-output"), metavar="FOLDER",
                        help="where the pictures go (default: %(default)s)")
    parser.add_argument("--compile-limit", type=float, default=10.0, metavar="SECONDS",
                        help="for torch.compile, per model (default: %(default)g)")
    parser.add_argument("--prepare", action="store_true", help="only compile, without a limit: torch keeps the code on disk for later runs")
    options = parser.parse_args(argv)
    if not options.compile_limit > 0:
        parser.error(f"--compile-limit wants more than 0 seconds, got {options.compile_limit:g}")
    console, start = report.console(), time.perf_counter()
    if options.prepare:
        _prepare(console)
        return 0
    machine = info.machine()
    console.print(f"{machine['processor']}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
                  f"native kernels: {machine['isa'] or 'none, see python -m fastdiff info'}")
    right = _models(console, options.compile_limit)
    right = _pictures(console, options.output) and right
    right = _ops(console, options.output) and right
    console.print(f"\n{time.perf_counter() - start:.0f} s in all")
    return 0 if right else 1
