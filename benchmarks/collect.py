"""Enters measured documents into a results file, and writes the tables made of it: all rows beside it, and README's.

python benchmarks/collect.py [FILE ...] [--into benchmarks/results/MACHINE.json]
"""

import argparse
import json
import re
import sys
from collections import defaultdict
from pathlib import Path

from fastdiff.bench import report

ROOT = Path(__file__).resolve().parent.parent
README, RESULTS = ROOT / "README.md", ROOT / "benchmarks" / "results" / "epyc-zen4-2-cores.json"
BEGIN, END = "<!-- measured: written by benchmarks/collect.py -->\n", "<!-- end of measured -->"
PASSES = ("forward", "both")
# op of a record of benchmarks/models.py -> what ran
MODELS = {"accelerate": "accelerated", "PatchedUNet": "in nn.PatchedUNet", "models": "ours"}
COMPILED = " + compile"


def entered(document, new):
    """document with the records of `new`, which take the place of older ones of the same runs."""
    key = lambda record: tuple(record[name] for name in report.KEY)
    records = {key(r): r for r in (*document["records"], *new["records"])}
    runs = dict(zip(document["command"].split(" ; "), document["ceilings"], strict=True))  # ceilings of each command
    command = re.sub(r"--json \S+", "--json FILE", new["command"])
    runs.pop(command, None)
    runs[command] = new["ceilings"]
    return document | {"machine": new["machine"], "versions": document["versions"] | new["versions"], "records": list(records.values()),
                       "command": " ; ".join(runs), "ceilings": list(runs.values())}


def _row(cells):
    return "| " + " | ".join(cells) + " |"


def _ratios(records):
    """Geometric mean and, of several, the lowest."""
    ratios = [r["ratio"] for r in records if r["ratio"]]
    if not ratios:
        return "-"
    return f"{report.mean_ratio(records):.2f}" + (f" ({min(ratios):.2f})" if len(ratios) > 1 else "")


def ops(records):
    """A row per op: geometric mean over its shapes, and the lowest, by dtype, pass and threads."""
    groups = defaultdict(list)
    for r in records:
        if r["op"].removesuffix(COMPILED) not in MODELS:
            groups[r["op"], r["dtype"], r["pass"], r["threads"]].append(r)
    columns = [("float32", p, n) for p in PASSES for n in (1, 2)] + [("bfloat16", p, 2) for p in PASSES]
    names = sorted({op for op, *_ in groups})
    title = {"forward": "forward", "both": "forward + backward"}
    head = ["op", *(f"{title[p]}, {dtype}, {n} thread{'s' * (n > 1)}" for dtype, p, n in columns)]
    lines = [_row(head), _row(["---"] * len(head))]
    for name in names:
        of = [groups[(name, *c)] for c in columns]
        count = max(map(len, of))
        lines.append(_row([f"`{name}`, {count} shape{'s' * (count > 1)}", *map(_ratios, of)]))
    return "\n".join(lines) + "\n"


def models(records):
    """A row per whole model and way to run it, on 2 threads: eager's and the compiler's time over ours, our memory over the best peer's."""
    runs = defaultdict(dict)
    for r in records:
        if r["op"].removesuffix(COMPILED) in MODELS and r["threads"] == 2 and r["peers_ms"]:
            runs[r["case"], r["op"]][r["pass"]] = r
    head = ["whole models, float32, 2 threads", *(f"{'forward' if p == 'forward' else 'training step'}, against {peer}" for p in PASSES
                                                 for peer in ("eager", "compile")), "extra memory, training step"]
    lines = [_row(head), _row(["---"] * len(head))]
    for (case, op), of in runs.items():
        cells = []
        for p in PASSES:
            for peer in ("eager", "compile"):
                ms = of[p]["peers_ms"].get(peer) if p in of else None
                cells.append(f"{ms / of[p]['ours_ms']:.2f}" if ms else "-")
        peak = of["both"]["peak_bytes"] / of["both"]["peer_peak_bytes"] if "both" in of else None
        how = MODELS[op.removesuffix(COMPILED)] + (", compiled" if op.endswith(COMPILED) else "")
        lines.append(_row([f"{case.removesuffix(', ours')}, {how}", *cells, f"{peak:.2f}" if peak else "-"]))
    return "\n".join(lines) + "\n"


def patches(records):
    """A row per patch of the patched U-Net, on 2 threads: time and extra memory of a step, and multiply-adds, over those of 1 pixel."""
    runs = {(r["shape"]["patch"], r["pass"]): r for r in records
            if r["op"] == "models" and r["threads"] == 2 and "published_gmac" in r["shape"]}
    if any((1, p) not in runs for p in PASSES):
        return ""
    head = ["patched U-Net, 256 pixels, a quarter of the paper's width", "forward", "training step", "extra memory of it",
            "multiply-adds, published"]
    lines = [_row(head), _row(["---"] * len(head))]
    for patch in sorted({patch for patch, _ in runs}):
        forward, both = ([runs[n, p] for n in (patch, 1)] for p in PASSES)
        cells = [(forward, "ours_ms", 1, "ms"), (both, "ours_ms", 1, "ms"), (both, "peak_bytes", 1e6, "MB")]
        texts = [f"{mine[key] / unit:.0f} {name}, 1/{first[key] / mine[key]:.1f}" for (mine, first), key, unit, name in cells]
        gmac = forward[1]["shape"]["published_gmac"] / forward[0]["shape"]["published_gmac"]
        lines.append(_row([f"patches of {patch}", *texts, f"1/{gmac:.1f}"]))
    return "\n".join(lines) + "\n\n"


def readme(text, records):
    """README with the tables of these records between its marks."""
    before, rest = text.split(BEGIN)
    after = rest[rest.index(END):]
    return f"{before}{BEGIN}\n{ops(records)}\n{models(records)}\n{patches(records)}{after}"


def rows(document):
    """Every record, under the commands that made them."""
    commands = "\n".join(f"    {c}" for c in document["command"].split(" ; "))
    title = "{processor} with {cores} cores, {isa}".format(**document["machine"])
    return f"# {title}\n\nFrom these commands, oldest first:\n\n{commands}\n\n{report.markdown(document['records'])}\n"


def main(argv):
    parser = argparse.ArgumentParser("python benchmarks/collect.py", description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="what `bench --json` or benchmarks/models.py --json wrote")
    parser.add_argument("--into", type=Path, default=RESULTS, metavar="FILE")
    options = parser.parse_args(argv)
    document = json.loads(options.into.read_text())
    for file in options.files:
        document = entered(document, json.loads(file.read_text()))
    options.into.write_text(json.dumps(document, indent=1) + "\n")
    options.into.with_suffix(".md").write_text(rows(document))
    if options.into.resolve() == RESULTS:
        README.write_text(readme(README.read_text(), document["records"]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
