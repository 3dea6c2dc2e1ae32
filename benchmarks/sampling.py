"""The 50-step DDIM loop around a denoiser that costs nothing, against the loop of diffusers' scheduler: what a sampler itself takes.

python benchmarks/sampling.py --threads 1,2 --quick
"""

import argparse
import sys

import torch

from fastdiff.bench import suite, timer
from fastdiff.diffusion import from_diffusers, sample

SHAPES = {"1x3x64x64": (1, 3, 64, 64), "16x4x64x64": (16, 4, 64, 64), "4x3x256x256": (4, 3, 256, 256)}
STEPS = 50


def loops(name, shape):
    """{side: its loop} for a scheduler of the class of this name, both given the same plan of steps."""
    import diffusers

    scheduler = getattr(diffusers, name)()
    scheduler.set_timesteps(STEPS)
    plan = from_diffusers(scheduler)
    z, pred = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))

    def theirs(_):
        generator, x = torch.Generator().manual_seed(1), z
        for t in scheduler.timesteps:
            x = scheduler.step(pred, t, x, generator=generator).prev_sample
        return x

    return {"ours": lambda _: sample(lambda z, t: pred, z, plan, generator=torch.Generator().manual_seed(1)), "diffusers": theirs}


def main(argv):
    """Runs the command; returns 1 when the two loops differ."""
    parser = argparse.ArgumentParser("python benchmarks/sampling.py", description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=suite.split(kind=int), default=[1], metavar="N[,N]")
    parser.add_argument("--quick", action="store_true", help="short times")
    options = parser.parse_args(argv)
    for threads in options.threads:
        torch.set_num_threads(threads)
        for name in ("DDIMScheduler", "DDPMScheduler"):
            for label, shape in SHAPES.items():
                calls = loops(name, shape)
                ours, theirs = calls["ours"](0), calls["diffusers"](0)
                # a prediction that does not follow x keeps the rounding of the first steps, divided by a signal of 0.008
                if not (ours - theirs).abs().max() <= 1e-3 * theirs.abs().max():
                    print(f"{name} {label}: the loops differ by {(ours - theirs).abs().max():.1e}", file=sys.stderr)
                    return 1
                times = timer.compare(timer.interleave(calls, timer.QUICK if options.quick else timer.Budget()))
                print(f"{name:14} {label:12} {threads} threads: ours {times['ours_ms']:7.2f} ms, diffusers' "
                      f"{times['peers_ms']['diffusers']:7.2f} ms, ratio {times['ratio']:.2f} ({times['ratio_low']:.2f} to "
                      f"{times['ratio_high']:.2f})", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
