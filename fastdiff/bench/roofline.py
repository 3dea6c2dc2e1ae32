"""The ceilings of this machine, measured in this process, and what they allow a call."""

import ctypes
import time
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch

NOISE = 1.05  # a median this far above a ceiling, itself a best time, is a mistake and not luck
MEASURED = {}  # (device type, threads) -> Ceilings


@dataclass
class Ceilings:
    """Copy rate (GB/s, read + written) of tensors far larger than the last-level cache, and torch.mm's rate (GF/s) per dtype."""

    device: str
    threads: int
    copy_GBs: float = 0.0
    gemm_GFs: dict = field(default_factory=dict)

    def measure(self, dtypes, seconds=0.5):
        """Measures what is missing, and again what is there: a ceiling is the best that was seen."""
        size = 256 << 20 if self.device == "cpu" else 2 << 30
        self.copy_GBs = max(self.copy_GBs, copy_GBs(size, self.device, seconds=seconds))
        for dtype in {"float32", *dtypes}:
            self.gemm_GFs[dtype] = max(self.gemm_GFs.get(dtype, 0.0), gemm_GFs(dtype, self.device, seconds))
        MEASURED[self.device, self.threads] = self
        return self

    def gemm(self, dtype):
        """GF/s that inputs of this dtype could reach: those of float32 where torch is slower in the narrow dtype, as it can be widened."""
        return self.gemm_GFs[dtype] if dtype == "float64" else max(self.gemm_GFs[dtype], self.gemm_GFs["float32"])

    def floor_ms(self, flops, bytes_, dtype, copy_GBs=0.0):
        """Least time of this work; copy_GBs is the copy rate at its size, where a cache makes that the higher one."""
        return max(bytes_ / max(self.copy_GBs, copy_GBs) / 1e6, flops / self.gemm(dtype) / 1e6)


def ceilings(device, dtypes, quick=False):
    """Ceilings of `device` at torch's present number of threads, measured once per process and dtype."""
    known = MEASURED.get((device, torch.get_num_threads())) or Ceilings(device, torch.get_num_threads())
    if not {"float32", *dtypes} <= set(known.gemm_GFs):
        known.measure(dtypes, 0.2 if quick else 0.5)
    return known


def above(record):
    """A sentence when a record is faster than the roofline allows, else None."""
    if record["of_floor"] > NOISE:
        return (f"{record['ours_ms']:.4g} ms is above the roofline: the floor is {record['floor_ms']:.4g} ms; "
                "one of time, bytes, flops and ceilings is wrong")
    return None


@lru_cache(None)
def last_level_cache(device="cpu"):
    """Bytes of the largest cache that the operating system reports (a GPU's L2); 32 MiB where it reports none."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    sizes = [_bytes(path.read_text()) for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max(sizes, default=32 << 20)


def _bytes(text):
    text = text.strip()
    unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:])
    return int(text[:-1]) * unit if unit else int(text)


def _best(run, device, seconds, least=3):
    """The shortest of the times that run(i) takes in about `seconds`."""
    best, i, begin = float("inf"), 0, time.perf_counter()
    while i < least or time.perf_counter() - begin < seconds:
        if device == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run(i)
            end.record()
            torch.cuda.synchronize()
            spent = start.elapsed_time(end) / 1e3
        else:
            before = time.perf_counter()
            run(i)
            spent = time.perf_counter() - before
        best, i = min(best, spent), i + 1
    return best


def copy_GBs(size, device, copies=1, seconds=0.1):
    """GB/s read + written when `size` bytes move (half read, half written), the source rotating among `copies`; the best of the ways tried.

    Ways on a CPU: torch's copy_, and memmove from as many threads, which passes the cache on large blocks.
    """
    half = max(size // 2 // 4, 1)
    sources = [torch.randn(half, device=device) for _ in range(copies)]
    target = torch.zeros(half, device=device)
    best = _best(lambda i: target.copy_(sources[i % copies]), device, seconds)
    threads = torch.get_num_threads()
    if device == "cpu" and half >= threads:
        part = 4 * half // threads
        to, from_ = target.data_ptr(), [x.data_ptr() for x in sources]
        with ThreadPoolExecutor(threads) as pool:
            def move(i):
                starts = [t * part for t in range(threads)]
                wait([pool.submit(ctypes.memmove, to + start, from_[i % copies] + start, part) for start in starts])

            best = min(best, _best(move, device, seconds))
    return 8 * half / best / 1e9


def gemm_GFs(dtype, device, seconds=0.5):
    """GF/s of torch.mm on square matrices, as large as fits the time."""
    dtype = getattr(torch, dtype)
    rate = 0.0
    for n in (256, 512, 1024, 2048) if device == "cpu" else (2048, 8192):
        if rate and 2 * n**3 / rate > 2 * seconds:
            break
        a, b, out = (torch.randn(n, n, device=device).to(dtype) for _ in range(3))
        torch.mm(a, b, out=out)
        rate = max(rate, 2 * n**3 / _best(lambda i, a=a, b=b, out=out: torch.mm(a, b, out=out), device, seconds))
    return rate / 1e9


def plot(results, ceilings, path):
    """A picture of records under their roofline: rates over flops per byte, and GB/s of what only moves data."""
    try:
        import matplotlib
    except ImportError:
        raise ModuleNotFoundError("the roofline picture needs matplotlib: pip install 'fastdiff-kernels[bench]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    moving, computing = [r for r in results if not r.flops], [r for r in results if r.flops]
    sides = [side for side, rows in (("computing", computing), ("moving", moving)) if rows]
    if not sides:
        raise ValueError("the roofline picture has nothing to show: no record was made")
    figure, axes = pyplot.subplots(1, len(sides), figsize=(7.5 * len(sides), 5.5), squeeze=False, layout="constrained")
    for axis, side in zip(axes[0], sides, strict=True):
        _roof(axis, computing, ceilings) if side == "computing" else _bars(axis, moving, ceilings)
    figure.suptitle(f"{ceilings.device}, {ceilings.threads} threads" if ceilings.device == "cpu" else ceilings.device)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _label(result):
    record = result.record
    return f"{record['op']} {record['case']} {record['dtype']}" + ("" if record["pass"] == "forward" else " + backward")


def _roof(axis, results, ceilings):
    points = [(r, r.flops / r.bytes) for r in results]
    low, high = min(x for _, x in points) / 2, max([100, *(x for _, x in points)]) * 2
    for dtype, rate in sorted(ceilings.gemm_GFs.items()):
        corner = rate / ceilings.copy_GBs
        axis.plot([low, max(corner, low), max(high, corner)], [min(low * ceilings.copy_GBs, rate), rate, rate], color="0.4", lw=1)
        axis.annotate(f"torch.mm {dtype}, {rate:.0f} GF/s", (high, rate), ha="right", va="bottom", fontsize=7, color="0.3")
    axis.annotate(f"copy {ceilings.copy_GBs:.0f} GB/s", (low, low * ceilings.copy_GBs), fontsize=7, color="0.3")
    for n, (result, x) in enumerate(points):
        record, color = result.record, f"C{n % 10}"
        axis.plot(x, result.flops / record["ours_ms"] / 1e6, "o", color=color, label=_label(result))
        if record["best_peer"]:
            axis.plot(x, result.flops / record["peers_ms"][record["best_peer"]] / 1e6, "o", mfc="none", color=color)
    axis.set(xscale="log", yscale="log", xlabel="flops per byte", ylabel="GF/s; filled: fastdiff, hollow: the best peer")
    axis.legend(fontsize=6, loc="lower right")


def _bars(axis, results, ceilings):
    names = [_label(r) for r in results]
    axis.barh(names, [r.bytes / r.record["ours_ms"] / 1e6 for r in results], height=0.35, align="edge", label="fastdiff")
    peers = [r for r in results if r.record["best_peer"]]
    rates = [r.bytes / r.record["peers_ms"][r.record["best_peer"]] / 1e6 for r in peers]
    axis.barh([_label(r) for r in peers], rates, height=-0.35, align="edge", color="0.7", label="best peer")
    axis.axvline(ceilings.copy_GBs, color="0.4", lw=1, label=f"copy {ceilings.copy_GBs:.0f} GB/s")
    axis.set(xlabel="GB/s, read + written")
    axis.tick_params(axis="y", labelsize=6)
    axis.legend(fontsize=7)
