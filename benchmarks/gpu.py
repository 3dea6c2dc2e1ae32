"""Everything that only a GPU can tell, within 20 minutes: make gpu.

Builds the libraries or takes those that are there, runs the property suite on the GPU and compute-sanitizer on small examples beside it,
then the benchmarks alone; writes results/<machine>.json, .png and .log, and prints a short table last. Needs no network.
"""

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch

from fastdiff.bench.report import mean_ratio

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ROOT / "fastdiff" / "_native" / "libfastdiff_cuda.so"
TOOLS = ("memcheck", "racecheck", "initcheck")


class Steps:
    """Commands with what came of them: (name, "ok" or what is wrong, seconds, last words)."""

    def __init__(self, log, minutes):
        self.log, self.end = log, time.monotonic() + 60 * minutes
        self.rows = []
        log.write_text("")

    def left(self):
        return max(self.end - time.monotonic(), 1)

    def run(self, name, command, seconds, words=r"$^", **environment):
        """Runs a command, which is killed after `seconds`; words: a pattern of the line of its output to show."""
        begin = time.monotonic()
        print(f"{name}: {' '.join(command)}", flush=True)
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
                                   start_new_session=True, env=os.environ | {"PYTHONPATH": path} | environment)
        try:
            text, _ = process.communicate(timeout=min(seconds, self.left()))
            state = "ok" if process.returncode == 0 else f"FAILED ({process.returncode})"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            text, state = process.communicate()[0], f"STOPPED after {min(seconds, self.left()):.0f} s"
        found = [line.strip() for line in text.splitlines() if re.search(words, line)]
        self.rows.append((name, state, time.monotonic() - begin, found[-1] if found else ""))
        with self.log.open("a") as log:
            log.write(f"==== {name}: {' '.join(command)}\n{text}\n")
        return state == "ok"

    def skip(self, name, why):
        self.rows.append((name, f"not run: {why}", 0.0, ""))


def stale():
    sources = [p.stat().st_mtime for p in (ROOT / "csrc").rglob("*") if p.is_file()]
    return not LIBRARY.exists() or LIBRARY.stat().st_mtime < max(sources)


def build(steps, rebuild):
    if not (rebuild or stale()):
        return steps.skip("build", f"{LIBRARY.name} is there and newer than its sources")
    if shutil.which("nvcc") is None:
        return steps.skip("build", "no nvcc" + (f"; {LIBRARY.name} is older than its sources" if LIBRARY.exists() else ""))
    major, minor = torch.cuda.get_device_capability()
    chip = f"{major}.{minor}" + ("a" if major >= 9 else "")
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return steps.run("build", command, 300, TORCH_CUDA_ARCH_LIST=os.environ.get("TORCH_CUDA_ARCH_LIST", chip), FASTDIFF_CUDA="1")


def correctness(steps, device, examples):
    """The property suite, and each sanitizer in a process of its own beside it."""
    several = ["-n", str(max(4, (os.cpu_count() or 1) // 2))] if _has("xdist") else []  # compiling is most of it
    suite = [sys.executable, "-m", "pytest", "tests/test_contract.py", "--device", device, "-p", "no:cacheprovider", *several]
    threads = [threading.Thread(target=steps.run, args=("properties", suite, 420, r"\d+ (passed|failed|error)"))]
    sanitizer = shutil.which("compute-sanitizer") or next(iter(Path("/usr/local").glob("cuda*/bin/compute-sanitizer")), None)
    for tool in TOOLS:
        if sanitizer is None:
            steps.skip(tool, "no compute-sanitizer")
        else:
            threads.append(threading.Thread(target=_sanitize, args=(steps, str(sanitizer), tool, device, examples)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _sanitize(steps, sanitizer, tool, device, examples):
    for backend in ("cuda", "triton"):
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--target-processes", "application-only", sys.executable, "-m",
                   "fastdiff", "verify", "--device", device, "--backend", backend, "--examples", str(examples), "--limit", "4096"]
        command += [word for name in ("values", "gradients") for word in ("--property", name)]
        # Every tensor an allocation of its own: what lies beside it is nobody's.
        steps.run(f"{tool}, {backend}", command, 200, "SUMMARY", PYTORCH_NO_CUDA_MEMORY_CACHING="1")


def benchmark(steps, device, results, quick):
    seconds = max(steps.left() - 60, 1)
    command = [sys.executable, "-m", "fastdiff", "bench", "--device", device, "--dtype", "bfloat16,float32", "--pass", "forward,both",
               "--seconds", f"{seconds:.0f}", "--json", str(results.with_suffix(".json")), *(["--quick"] if quick else [])]
    if _has("matplotlib"):
        command += ["--plot", str(results.with_suffix(".png"))]
    steps.run("benchmarks", command, seconds + 55, r"rows left out|geometric mean")


def _has(module):
    return subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True).returncode == 0


def _cell(records):
    if not records:
        return "-"
    ratio, floor = mean_ratio(records), math.exp(sum(math.log(max(r["of_floor"], 1e-9)) for r in records) / len(records))
    return ("-" if ratio is None else f"{ratio:.2f}") + f" / {floor:.2f}"


def summary(steps, results):
    """The short table: steps, then one line an op."""
    lines = [f"{name:18} {state:28} {seconds:6.0f} s  {words[:90]}" for name, state, seconds, words in steps.rows]
    path = results.with_suffix(".json")
    if path.exists():
        document = json.loads(path.read_text())
        kinds = sorted({(r["dtype"], r["pass"]) for r in document["records"]})
        lines += ["", "geometric mean of the ratio to the best peer / of the floor, by op",
                  f"{'':26}" + "".join(f"{f'{dtype} {pass_}':>20}" for dtype, pass_ in kinds) + "   least ratio"]
        for op in sorted({r["op"] for r in document["records"]}):
            mine = [r for r in document["records"] if r["op"] == op]
            cells = [_cell([r for r in mine if (r["dtype"], r["pass"]) == kind]) for kind in kinds]
            least = min((r["ratio"] for r in mine if r["ratio"]), default=math.nan)
            lines.append(f"{op:26}" + "".join(f"{cell:>20}" for cell in cells) + f"{least:14.2f}")
        lines += [f"FAILED {failure['op']}, {failure['case']}, {failure['dtype']}, {failure['pass']}: {failure['reason'][:120]}"
                  for failure in document.get("failures", [])]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: a rehearsal")
    parser.add_argument("--examples", type=int, default=2, help="of each property under a sanitizer")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--build", action="store_true", help="even if the library is newer than its sources")
    parser.add_argument("--quick", action="store_true", help="the benchmarks' two smallest cases of each op")
    parser.add_argument("--only", default="build,correctness,benchmarks", help="steps, between commas")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device")
    name = torch.cuda.get_device_name() if options.device == "cuda" else "rehearsal"
    results = options.out / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    results.with_suffix(".json").unlink(missing_ok=True)
    steps = Steps(results.with_suffix(".log"), options.minutes)
    only = options.only.split(",")
    if "build" in only and options.device == "cuda":
        build(steps, options.build)
    if "correctness" in only:
        correctness(steps, options.device, options.examples)
    if "benchmarks" in only:
        benchmark(steps, options.device, results, options.quick)
    print("\n" + summary(steps, results))
    print(f"\nresults: {results}.json, .png, .log")
    return 1 if any(state.startswith(("FAILED", "STOPPED")) for _, state, _, _ in steps.rows) else 0


if __name__ == "__main__":
    sys.exit(main())
