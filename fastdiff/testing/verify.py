"""python -m fastdiff verify: the properties of every op on drawn examples, or malformed calls in a child process."""

import argparse
import queue
import subprocess
import sys
import threading
from collections import Counter

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from ..core.contract import public
from .check import LIMIT, run
from .properties import PROPERTIES, dtypes, gradients, subjects, values

PATIENCE = 120  # seconds without a word from the child before a call counts as hanging


def _parser():
    parser = argparse.ArgumentParser("python -m fastdiff verify", description=__doc__)
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"of {', '.join(sorted(public()))}; all unless named")
    parser.add_argument("--examples", type=int, default=50, metavar="N", help="per op, backend and property (default 50)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--backend", help="only this one: cpu, cuda, triton or reference")
    parser.add_argument("--property", action="append", choices=[p.name for p in PROPERTIES], help="only these (may be repeated)")
    parser.add_argument("--limit", type=int, default=LIMIT, help="most elements of an example's arguments, and a hundredth of its flops")
    parser.add_argument("--seed", type=int, help="other examples than usual")
    parser.add_argument("--malformed", type=int, metavar="N", help="throw N malformed calls at each op instead, in a child process (CPU)")
    return parser


def _bar(console):
    return Progress(TextColumn("{task.description:48}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console)


def main(argv=None):
    """Returns the exit code: 0 when every property holds, 1 when one fails, 2 for a wrong command line."""
    parser = _parser()
    options = parser.parse_args(argv)
    if unknown := set(options.ops) - set(public()):
        parser.error(f"unknown op {', '.join(sorted(unknown))}; there are {', '.join(sorted(public()))}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    console = Console(width=None if sys.stdout.isatty() else 180)
    return _malformed(options, console) if options.malformed else _properties(options, console)


# Properties

def _runs(subject, options, first):
    """(property, dtypes) of the runs to make: values and gradients once per dtype, for their rows in the table."""
    takes = dtypes(subject)
    for p in PROPERTIES:
        if (options.property and p.name not in options.property) or (p.once and not first):
            continue
        if p.tiny:
            if torch.float64 in takes:
                yield p, (torch.float64,)
        elif p.check in (values, gradients):
            for dtype in takes:
                yield p, (dtype,)
        else:
            yield p, takes


def _properties(options, console):
    chosen = list(subjects(options.device, options.ops, [options.backend] if options.backend else None))
    if not any(why is None for _, why in chosen):
        console.print(f"no op has the backend {options.backend} here: {chosen[0][1] if chosen else 'unknown to every op'}")
        return 1
    first = {}
    for subject, why in chosen:
        if why is None:
            first.setdefault(subject.name, subject.backend)
    plan = [(s, p, d) for s, why in chosen if why is None for p, d in _runs(s, options, first[s.name] == s.backend)]
    counts = [p.count(options.examples) for _, p, _ in plan]
    results = []
    with _bar(console) as bar:
        task = bar.add_task("", total=sum(counts))
        before = 0
        for (subject, p, takes), count in zip(plan, counts, strict=True):
            bar.update(task, description=f"{subject} {p.name}", completed=before)
            results.append(run(p.check, subject, count=count, dtypes=takes, device=options.device, limit=options.limit, tiny=p.tiny,
                               seed=options.seed, step=lambda: bar.advance(task)))
            before += count
        bar.update(task, description="", completed=before)
    console.print(_errors(plan, results))
    console.print(_holds(plan, results))
    for subject, why in chosen:
        if why:
            console.print(f"not run: {subject}: {why}", markup=False)
    failures = [r.failure for r in results if r.failure]
    for text in failures:
        console.print(f"FAILED {text}", markup=False, style="red", soft_wrap=True)
    return 1 if failures else 0


def _errors(plan, results):
    table = Table(*(Column(name, no_wrap=True) for name in ("op", "backend", "dtype", "pass", "examples", "worst error / limit")),
                  "input that came worst", title="errors")
    for (subject, p, takes), result in zip(plan, results, strict=True):
        if p.check not in (values, gradients):
            continue
        dtype = str(takes[0]).removeprefix("torch.")
        passes = {"output": "forward"} if p.check is values else {"gradient": "backward"}
        if p.check is gradients:
            rows = {name: e for name, e in result.errors.items() if name.startswith("gradient")}
        else:
            rows = result.errors
        for name, (e, where) in rows.items():
            label = passes.get(name, name)
            mark = "red" if result.failure else None
            table.add_row(subject.name, subject.backend, dtype, label, str(result.examples), f"{e.ratio:.2f}", str(where), style=mark)
    return table


def _holds(plan, results):
    names = [p.name for p in PROPERTIES if any(q is p for _, q, _ in plan)]
    table = Table("property", title="examples that hold")
    columns = list(dict.fromkeys((s.name, s.backend) for s, _, _ in plan))
    for name, backend in columns:
        table.add_column(f"{name}\n{backend}", justify="right", no_wrap=True)
    for name in names:
        cells = []
        for column in columns:
            mine = [r for (s, p, _), r in zip(plan, results, strict=True) if p.name == name and (s.name, s.backend) == column]
            failed = any(r.failure for r in mine)
            total = sum(r.examples for r in mine)
            cells.append("[red]fails[/red]" if failed else str(total) if total else "refused" if any(r.refused for r in mine) else "")
        table.add_row(name, *cells)
    return table


# Malformed calls

def _malformed(options, console):
    table = Table("op", "calls", "clean errors", "legal, as the reference", "unclean errors", "silent", "crashes", title="malformed calls")
    names, bad = options.ops or sorted(public()), []
    with _bar(console) as bar:
        task = bar.add_task("", total=options.malformed * len(names))
        for name in names:
            bar.update(task, description=name)
            counts = Counter()
            for word, text in _thrown(name, options):
                counts[word] += 1
                bar.advance(task)
                if word not in ("clean", "legal"):
                    bad.append(f"{word}: {name}: {text}")
            table.add_row(name, str(counts.total()), *(str(counts[w]) for w in ("clean", "legal", "unclean", "silent", "crash")))
    console.print(table)
    for text in bad[:40]:
        console.print(text, markup=False, style="red", soft_wrap=True)
    return 1 if bad else 0


def _thrown(name, options):
    """(outcome, text) of each call; a child that dies or hangs is a crash of the call it announced last, and the next child goes on."""
    start = 0
    while start < options.malformed:
        command = [sys.executable, "-m", "fastdiff.testing.malformed", name, options.backend or "", str(start), str(options.malformed),
                   str(options.seed or 0)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        lines, errors = queue.SimpleQueue(), []
        threading.Thread(target=_read, args=(child.stdout, lines), daemon=True).start()
        drain = threading.Thread(target=lambda errors=errors, child=child: errors.append(child.stderr.read()), daemon=True)
        drain.start()
        announced = None
        while True:
            try:
                line = lines.get(timeout=PATIENCE)
            except queue.Empty:
                child.kill()
                line = None
            if line is None:
                break
            kind, *fields = line.rstrip("\n").split("\t", 2)
            if kind == "call":
                start, announced = int(fields[0]) + 1, fields[1]
            elif kind == "done":
                yield fields[0], f"{announced}: {fields[1]}"
                announced = None
        code = child.wait()
        drain.join()
        if announced is not None:
            yield "crash", f"{announced}: the process ended with {code}: {errors[0][-300:]}"
        elif start < options.malformed:
            raise RuntimeError(f"verify --malformed: the child process ended with {code} between calls: {errors[0]}")


def _read(stream, lines):
    for line in stream:
        if line.startswith(("call\t", "done\t")):
            lines.put(line)
    lines.put(None)


if __name__ == "__main__":
    sys.exit(main())
