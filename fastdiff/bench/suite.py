"""Times every benchmark case of every op beside other libraries, once its result is known to be right."""

import argparse
import importlib.util
import json
import math
import shlex
import sys
import time
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..core.backend import use_backend
from ..core.contract import public
from ..explain import backend, calls
from ..info import machine, versions
from ..testing.budget import error
from . import memory, overhead, report, roofline, timer
from .inputs import Call, make

DTYPES = ("float32", "bfloat16", "float16", "float64")
PASSES = ("forward", "both")
COPIES = 1 << 30  # bytes that the copies of a case's inputs may take
REFERENCE = 4 << 30  # bytes that the reference may take as a peer
# What a peer may differ by, relative to the largest value, before it counts as computing something else.
PEER_ERROR = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 1e-2, "float64": 1e-6}


class Wrong(Exception):
    """A result outside its limit, or a time above the roofline."""


@dataclass(frozen=True)
class Row:
    """One record to be: an op at a benchmark row's sizes."""

    op: str
    case: object
    function: object
    name: str
    sizes: dict
    dtype: str
    pass_: str
    device: str
    threads: int

    def key(self):
        return {"op": self.op, "case": self.name, "dtype": self.dtype, "pass": self.pass_, "device": self.device, "threads": self.threads}

    def work(self):
        """(flops, bytes) of the pass at the least: a backward reads and writes no less than the forward."""
        arguments = self.case.arguments(**self.sizes)
        flops, moved = self.case.flops(**arguments), self.case.bytes(getattr(torch, self.dtype).itemsize, **arguments)
        return (flops * (1 + self.case.backward_flops), 2 * moved) if self.pass_ == "both" else (flops, moved)


@dataclass
class Result:
    record: dict
    flops: float
    bytes: float
    copy_GBs: float  # at the record's own size where a cache serves it, else 0

    def place(self, ceilings):
        """Sets floor_ms and of_floor."""
        floor = ceilings.floor_ms(self.flops, self.bytes, self.record["dtype"], self.copy_GBs)
        self.record.update(floor_ms=floor, of_floor=floor / self.record["ours_ms"])


@dataclass
class Outcome:
    """document: what --json writes. failures: {key of a record, reason}. notes: what was left out, and why."""

    document: dict
    results: list
    ceilings: list
    failures: list = field(default_factory=list)
    notes: list = field(default_factory=list)


# Peers

def find_peers(path=None):
    """(module of peers or None, sentence), from `path`, or from benchmarks/peers.py beside the package or in the current folder."""
    places = [Path(path)] if path else [folder / "benchmarks" / "peers.py" for folder in (Path(__file__).parents[2], Path.cwd())]
    place = next((p for p in places if p.is_file()), None)
    if place is None:
        if path:
            raise FileNotFoundError(f"--peers: no file {path}")
        return None, ("no benchmarks/peers.py beside the package or in this folder: the only peer is eager, the op's own reference "
                      "(--peers FILE names others)")
    spec = importlib.util.spec_from_file_location("fastdiff_peers", place)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    missing = "".join(f"; {name} is missing ({why})" for name, why in module.MISSING.items())
    return module, f"peers from {place.name}{missing}"


def _wanted(name, default, against):
    if against is None:
        return default
    return against == ["all"] or any(fnmatchcase(name, pattern) for pattern in against)


def _peers_of(row, module, against):
    """name -> callable of the row's op."""
    if module is not None and row.op in module.PEERS:
        return {name: peer for name, peer in module.PEERS[row.op].items() if _wanted(name, peer.default, against)}

    def eager(**arguments):
        with use_backend("reference"):
            return row.function(**arguments)

    return {"eager": eager} if _wanted("eager", True, against) else {}


def _refusal(peer, call, row, reference_bytes):
    refuse = getattr(peer, "refuse", None)
    if refuse is not None:
        return refuse(**call.arguments)
    if not hasattr(peer, "default") and reference_bytes > REFERENCE:
        return f"the reference would take about {reference_bytes / 1e9:.0f} GB"
    return None


# One row

def _names(call, results):
    outs = [f"output {i}" for i in range(len(results) - (len(call.wanted()) if call.dout is not None else 0))]
    return outs + ([f"gradient of {name}" for name in call.wanted()] if call.dout is not None else [])


def _worst(call, function, case, ours, plain, exact):
    """The tensor nearest to its limit; raises Wrong beyond. Nearby inputs, and PyTorch's own fused op, are asked only when it matters."""
    rows = list(zip(_names(call, ours), ours, plain, exact, strict=True))
    errors = [error(*row) for row in rows]
    if any(e.ratio > 1 for e in errors):
        nearby = [(call(case.taking(case.fused)), exact)] if case.fused else []
        with use_backend("reference"):
            for other in map(call.nudged, range(1, 17)):
                nearby.append((other.by_parts(function, case), other.by_parts(function, case, torch.float64)))
        errors = [error(*row, nearby=[(p[i], e[i]) for p, e in nearby]) for i, row in enumerate(rows)]
    worst = max(errors, key=lambda e: e.ratio)
    if worst.ratio > 1:
        raise Wrong(f"{worst.tensor} is off by {worst.error:.3g} where the float64 reference allows {worst.limit:.3g}")
    return worst


def same(peer, results, exact, dtype):
    """Raises Wrong when a peer computes something else."""
    if len(results) != len(exact):
        raise Wrong(f"peer {peer} returns {len(results)} results, the reference {len(exact)}")
    # What is 0 by cancellation is 0 to the rounding of the rest.
    least = 2 * PEER_ERROR[dtype] * max((want.abs().max().item() for want in exact if want.numel()), default=0.0)
    for got, want in zip(results, exact, strict=True):
        if got.shape != want.shape:
            raise Wrong(f"peer {peer} returns the shape {tuple(got.shape)}, the reference {tuple(want.shape)}: it computes something else")
        off = (got.double() - want).abs().max().item() if want.numel() else 0.0
        allowed = PEER_ERROR[dtype] * max(want.abs().max().item(), least) if want.numel() else 0.0
        if not off <= allowed:
            raise Wrong(f"peer {peer} is off by {off:.3g} (allowed {allowed:.3g}): it computes something else")


def _copies(call, count):
    return [call, *(call.copy() for _ in range(count - 1))]


def measure(row, module, against, budget, ceilings, notes):
    """Result of a row: right first, then timed, then right still. Raises Wrong."""
    call = Call(make(row.case.arguments(**row.sizes), row.dtype, row.device, grad=row.pass_ == "both"))
    contract, args = calls(row.function, **call.arguments)[0]
    chosen = backend(contract, args)[0]
    if row.pass_ == "both":
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            outs = row.function(**call.arguments)
        outs = outs if isinstance(outs, tuple) else (outs,)
        dout = [torch.empty_like(y).copy_(torch.randn(y.shape, generator=generator)) for y in outs]
        call = Call(call.arguments, tuple(dout))
    ours = call(row.function)
    with use_backend("reference"):
        exact = call.by_parts(row.function, row.case, torch.float64)
        spent, plain = memory.peak(lambda: call.by_parts(row.function, row.case), row.device)
    worst = _worst(call, row.function, row.case, ours, plain, exact)

    runs = {"ours": row.function}
    for name, peer in _peers_of(row, module, against).items():
        why = _refusal(peer, call, row, (spent or 0) * call.parts(row.case))
        if why is None:
            try:
                same(name, call(peer), exact, row.dtype)
            except RuntimeError as failure:  # not implemented for this dtype or device, out of memory, would not compile
                why = f"{row.dtype}, {row.pass_}: " + (str(failure).strip().splitlines() or [type(failure).__name__])[0]
        if why is None:
            runs[name] = peer
        elif (note := f"{row.op}, {row.name}: {name} left out: {why}") not in notes:
            notes.append(note)

    flops, moved = row.work()
    cache = roofline.last_level_cache(row.device)
    memory_bound = moved / ceilings.copy_GBs > flops / ceilings.gemm(row.dtype)
    count = min(math.ceil(2 * cache / call.nbytes()), COPIES // call.nbytes() + 1, 1024) if memory_bound and row.device == "cpu" else 1
    copies = _copies(call, count)
    timed = {name: lambda i, run=run: copies[i % count](run) for name, run in runs.items()}
    for run in timed.values():
        run(1)
    if row.device == "cuda":
        samples, host = timer.interleave_cuda(timed, budget, row.device)
    else:
        samples, host = timer.interleave(timed, budget), None
    peak, after = memory.peak(lambda: copies[-1](row.function), row.device)
    if not all(map(torch.equal, ours, after)):
        _worst(call, row.function, row.case, after, plain, exact)

    times = timer.compare(samples)
    record = {**row.key(), "backend": chosen.name, "shape": row.sizes, **times, "floor_ms": None, "of_floor": None,
              "peak_bytes": peak,
              "peer_peak_bytes": memory.peak(lambda: call(runs[times["best_peer"]]), row.device)[0] if times["best_peer"] else None,
              "error": worst.error, "error_limit": worst.limit}
    if host is not None:
        record["host_us"] = host["ours"] * 1e6
    small = memory_bound and moved < 2 * cache
    result = Result(record, flops, moved, roofline.copy_GBs(moved, row.device, count) if small else 0.0)
    result.place(ceilings)
    if roofline.above(record):  # the ceiling itself may have been disturbed
        ceilings.measure([row.dtype])
        if small:
            result.copy_GBs = max(result.copy_GBs, roofline.copy_GBs(moved, row.device, count, seconds=0.5))
        result.place(ceilings)
        if why := roofline.above(record):
            raise Wrong(why)
    return result


# All rows

def _cost(case, name):
    arguments = case.arguments(**case.sizes(**case.bench[name]))
    return case.flops(**arguments) + case.bytes(4, **arguments)


def rows(ops, *, device, threads, passes, dtypes, cases, quick):
    """Rows of the selected ops and cases; quick: of each op the two with the least work."""
    selected = []
    for op, (function, case) in ops.items():
        names = [name for name in case.bench if fnmatchcase(name, cases)]
        if quick and cases == "*":
            costs = {name: _cost(case, name) for name in names}
            names = sorted(names, key=costs.get)[:2]
        selected += [(op, case, case.taking(function), name, case.sizes(**case.bench[name])) for name in names]
    return [Row(*start, dtype, pass_, device, n) for n in threads for start in selected for dtype in dtypes for pass_ in passes]


def run(ops=None, *, device="cpu", threads=None, passes=("forward",), dtypes=("float32",), cases="*", against=None, peers=None, quick=False,
        seconds=None, command="fastdiff.bench.suite.run", progress=None):
    """Measures and returns an Outcome. ops: public names (None: all). threads: counts to run at. progress(done, total, text) is told.

    seconds: no row begins after them, and then every op's first rows come before any op's second.
    """
    begin = time.monotonic()
    module, sentence = find_peers(peers)
    todo = rows({op: public()[op] for op in ops or public()}, device=device, threads=threads or [torch.get_num_threads()], passes=passes,
                dtypes=dtypes, cases=cases, quick=quick)
    if seconds:
        todo.sort(key=lambda row: list(row.case.bench).index(row.name))
    budget = timer.QUICK if quick else timer.Budget()
    results, failures, notes, ceilings = [], [], [sentence], {}
    before = torch.get_num_threads()
    try:
        for done, row in enumerate(todo):
            if seconds and time.monotonic() - begin > seconds:
                notes.append(f"{len(todo) - done} of {len(todo)} rows left out: {seconds:g} s had passed")
                break
            torch.set_num_threads(row.threads)
            if progress:
                progress(done, len(todo), f"{row.op}, {row.name}, {row.dtype}, {row.pass_}")
            if row.threads not in ceilings:
                ceilings[row.threads] = roofline.ceilings(device, dtypes, quick)
            if against and any(fnmatchcase("compile", p) or p == "all" for p in against):
                torch.compiler.reset()  # compiled code is for one shape and number of threads
            try:
                results.append(measure(row, module, against, budget, ceilings[row.threads], notes))
            except Exception as failure:  # any way for a case to fail is a finding about the case, and the others still run
                why = str(failure) if isinstance(failure, Wrong) else f"{type(failure).__name__}: {failure}"
                failures.append({**row.key(), "reason": why})
    finally:
        torch.set_num_threads(before)
    if progress:
        progress(len(todo), len(todo), "")
    for result in results:
        result.place(ceilings[result.record["threads"]])
    known = versions() | (module.VERSIONS if module else {})
    outcome = Outcome(document(command, known, list(ceilings.values()), [r.record for r in results]), results, list(ceilings.values()),
                      failures, notes)
    if failures:
        outcome.document["failures"] = failures
    return outcome


def document(command, known, ceilings, records):
    rates = {c.threads: {"copy_GBs": c.copy_GBs, "gemm_GFs": c.gemm_GFs} for c in ceilings}
    found = dict(rates[max(rates)]) if rates else {}
    if len(rates) > 1:
        found["by_threads"] = rates
    return {"machine": machine(), "versions": known, "command": command, "ceilings": found, "records": records}


# The command

def split(choices=None, kind=str):
    def parse(text):
        try:
            values = [kind(value) for value in text.split(",") if value]
        except ValueError:
            raise argparse.ArgumentTypeError(f"wants {kind.__name__} values between commas, got {text!r}") from None
        wrong = [value for value in values if (value not in choices if choices else kind is int and value < 1)]
        if wrong or not values:
            raise argparse.ArgumentTypeError(f"wants {' or '.join(choices) if choices else 'values of at least 1'}, got {text!r}")
        return values

    return parse


def _parser():
    parser = argparse.ArgumentParser("python -m fastdiff bench", description=__doc__)
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"all unless given: {', '.join(sorted(public()))}")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=split(kind=int), action="extend", metavar="N[,N]", help="torch's number of threads unless given")
    parser.add_argument("--pass", dest="passes", type=split(PASSES), default=["forward"], metavar="forward|both", help="both: and backward")
    parser.add_argument("--dtype", type=split(DTYPES), default=["float32"], metavar="DTYPE[,DTYPE]")
    parser.add_argument("--case", default="*", metavar="GLOB", help="benchmark rows by name")
    parser.add_argument("--against", type=split(), metavar="PEER[,..]|all", help="names, globs; unless given, those that need no building")
    parser.add_argument("--peers", metavar="FILE", help="where peers are, instead of benchmarks/peers.py")
    parser.add_argument("--json", metavar="FILE", help="write everything measured")
    parser.add_argument("--baseline", metavar="FILE", help="compare with the --json file of an older run")
    parser.add_argument("--plot", metavar="FILE", help="draw a roofline picture (needs matplotlib)")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--quick", action="store_true", help="few cases (or those of --case) and short times")
    parser.add_argument("--seconds", type=float, metavar="N", help="begin no row after these; the rest is left out, and said")
    parser.add_argument("--overhead", action="store_true", help="only what a call costs on 16-element tensors")
    return parser


def _checked(parser, options):
    """Refuses what cannot run before anything is timed; returns the older run's document, if there is one."""
    known = public()
    if unknown := [op for op in options.ops if op not in known]:
        parser.error(f"unknown op {', '.join(unknown)}; there are {', '.join(sorted(known))}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    selected = {op: known[op] for op in options.ops or known}
    names = {name for _, case in selected.values() for name in case.bench}
    if not any(fnmatchcase(name, options.case) for name in names):
        parser.error(f"--case {options.case!r} fits none of: {'; '.join(sorted(names))}")
    try:
        module, _ = find_peers(options.peers)
    except FileNotFoundError as failure:
        parser.error(str(failure))
    against = [p for p in options.against or [] if p != "all"]
    offered = sorted({"eager", *(name for op in selected for name in (module.PEERS.get(op, {}) if module else {}))})
    if unknown := [p for p in against if not any(fnmatchcase(name, p) for name in offered)]:
        parser.error(f"--against: no peer {', '.join(unknown)}; there are {', '.join(offered)}")
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install 'fastdiff-kernels[bench]'")
    if not options.baseline:
        return None
    try:
        old = json.loads(Path(options.baseline).read_text())
        report.against([], old)
    except (OSError, ValueError, KeyError, TypeError) as failure:
        parser.error(f"--baseline {options.baseline} is not the --json file of a run: {failure}")
    return old


def _with_bar(options, command):
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = report.console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("ceilings")
        return run(options.ops, device=options.device, threads=options.threads, passes=options.passes, dtypes=options.dtype,
                   cases=options.case, against=options.against, peers=options.peers, quick=options.quick, seconds=options.seconds,
                   command=command, progress=lambda done, total, text: bar.update(task, completed=done, total=total, description=text))


def main(argv):
    """Runs the command; returns 1 when a case failed its properties."""
    parser = _parser()
    options = parser.parse_args(argv)
    old = _checked(parser, options)
    command = shlex.join(["python", "-m", "fastdiff", "bench", *argv])
    console = report.console()
    if options.overhead:
        known = public()
        measured = overhead.measure({op: known[op] for op in options.ops or known})
        console.print(report.overhead_table(measured))
        outcome = Outcome(document(command, versions(), [], []) | {"overhead": measured}, [], [])
    else:
        outcome = _with_bar(options, command)
        _print(console, outcome, options.markdown)
    records = outcome.document["records"]
    if options.json:
        Path(options.json).write_text(json.dumps(outcome.document, indent=1) + "\n")
    if old is not None:
        console.print(report.baseline_table(report.against(records, old)))
    if options.plot and outcome.results:
        most = max(outcome.ceilings, key=lambda c: c.threads)
        roofline.plot([r for r in outcome.results if r.record["threads"] == most.threads], most, options.plot)
    return 1 if outcome.failures else 0


def _print(console, outcome, markdown):
    records = outcome.document["records"]
    if markdown:
        print(report.markdown(records))
    elif records:
        console.print(report.table(records))
    if (mean := report.mean_ratio(records)) is not None:
        console.print(f"\ngeometric mean of the ratios: {mean:.2f} over {len(records)} records")
    for c in outcome.ceilings:
        rates = ", ".join(f"torch.mm {dtype} {rate:.0f} GF/s" for dtype, rate in c.gemm_GFs.items())
        console.print(f"ceilings, {c.threads} threads: copy {c.copy_GBs:.1f} GB/s, {rates}")
    for note in outcome.notes:
        console.print(f"note: {note}", style="dim")
    for failure in outcome.failures:
        where = ", ".join(str(failure[k]) for k in report.KEY)
        console.print(f"FAILED {where}: {failure['reason']}", style="red")
