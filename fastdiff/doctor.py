"""Behind `python -m fastdiff doctor`: what `accelerate` would do for a model, measured, and what nothing can do for it."""

import argparse
import inspect
import json
import sys
from dataclasses import asdict
from importlib import import_module

import torch
from rich.console import Console

from .accelerate import accelerate


def _input(text):
    """A tensor of SHAPE or SHAPE:DTYPE, "2x3x32x32" or "2x16:int64": normal numbers, zeros for integers."""
    shape, _, name = text.partition(":")
    dtype = getattr(torch, name or "float32", None)
    try:
        sizes = [int(n) for n in shape.split("x")] if shape else []
    except ValueError:
        sizes = [-1]
    if not isinstance(dtype, torch.dtype) or min(sizes, default=1) < 1:
        raise argparse.ArgumentTypeError(f"wants a shape such as 2x3x32x32 or 2x16:int64, got {text!r}")
    return torch.randn(sizes).to(dtype) if dtype.is_floating_point else torch.zeros(sizes, dtype=dtype)


def _model(target):
    """(model, example or None) that MODULE:FACTORY makes."""
    module, _, factory = target.partition(":")
    if not factory:
        raise ValueError(f"wants MODULE:FACTORY, got {target!r}")
    made = import_module(module)
    for name in factory.split("."):
        made = getattr(made, name)
    if not isinstance(made, torch.nn.Module) and callable(made):
        made = made()
    model, example = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, torch.nn.Module):
        raise ValueError(f"{target} wants to be or return a torch.nn.Module, or (module, example), got {type(model).__name__}")
    return model, example


def main(argv):
    """Prints the report for a model; returns 0, or 2 when the model could not be made or run."""
    parser = argparse.ArgumentParser("python -m fastdiff doctor", description=inspect.getdoc(sys.modules[__name__]))
    parser.add_argument("target", metavar="MODULE:FACTORY", help="a module, from the current folder too, and what in it makes the model or "
                        "(model, example), or is one")
    parser.add_argument("--input", metavar="SHAPE", type=_input, action="append", default=[],
                        help="an input, such as 2x3x32x32 or 2x16:int64, once for each; without any the factory's example, or no figures")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="of the model and of its float32 inputs")
    parser.add_argument("--device", type=torch.device)
    parser.add_argument("--threads", type=int, help="that PyTorch may use")
    parser.add_argument("--json", action="store_true", help="the report as JSON")
    options = parser.parse_args(argv)
    threads = torch.get_num_threads()
    try:
        if options.threads:
            torch.set_num_threads(options.threads)
        model, example = _model(options.target)
        example = tuple(options.input) or example
        dtype = getattr(torch, options.dtype) if options.dtype else None
        model = model.to(device=options.device, dtype=dtype)

        def placed(x):
            return x.to(device=options.device, dtype=dtype if x.dtype == torch.float32 else None) if isinstance(x, torch.Tensor) else x

        if example is not None:
            example = torch.utils._pytree.tree_map(placed, example)
        report = accelerate(model, example, show=False)
    except Exception as error:  # the model is the caller's: whatever it raises is the answer
        print(f"fastdiff doctor: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    finally:
        torch.set_num_threads(threads)
    if options.json:
        print(json.dumps(asdict(report), indent=1))
        return 0
    console = Console()
    report.print(console)
    if not report.measured:
        console.print("Without an example nothing was run: give --input SHAPE for each input, or let the factory return (model, example).")
    return 0
