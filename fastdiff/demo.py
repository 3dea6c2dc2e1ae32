"""Public models on a real photograph, plain, accelerated and compiled; then the ops against PyTorch: behind `python -m fastdiff demo`."""

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

INSTALL = "pip install rin-pytorch perceiver-pytorch scikit-learn pillow"
BUDGET = Budget(pairs=20, least=1.0, most=4.0, fewest=5)
OPS = ("attention", "fourier_cross_attend", "patchify", "unpatchify")  # the microbenchmark of a minute
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
                        help="where the roofline picture goes (default: %(default)s)")
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
    right = _ops(console, options.output) and right
    console.print(f"\n{time.perf_counter() - start:.0f} s in all")
    return 0 if right else 1
