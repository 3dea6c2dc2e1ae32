"""The error budget: at most twice the error of plain PyTorch in the same dtype, and one rounding."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Error:
    """Largest error of one tensor, and the limit it has to keep."""

    tensor: str
    error: float
    limit: float

    @property
    def ratio(self):
        return self.error / self.limit if self.limit else (0.0 if self.error == 0 else float("inf"))


def error(tensor, ours, plain, exact, nearby=(), times=2, largest=0.0):
    """Error of `ours` against `exact` (float64), under the limit times * max|plain - exact| + one rounding.

    One rounding is eps max|exact|, or the dtype's smallest number above 0, or what a rounding of the inputs does to `exact` (a difference
    within `nearby`), if that is more. Plain PyTorch's error on one input can be nearly 0 by luck, the more so the fewer elements there
    are: `nearby` holds further (plain, exact), of inputs that differ by a rounding or by PyTorch's own fused op, and its error is the
    largest of all. In float64 plain and exact would be the same function: there `plain` is float32's, and 16 times its error, scaled to
    float64's eps, counts.

    largest: the largest number among all results of the call. What is 0 by cancellation may be off by eps^2 of it, the rounding of a
    rounding (eps that of the arithmetic, which is float32 for narrower dtypes).

    Integers must be equal. Non-finite values must stand where `exact`, rounded to our dtype, has them. Where `exact` is finite and plain
    PyTorch overflows, ours may do either: those elements have no limit. Raises AssertionError for another shape or dtype than the
    reference's.
    """
    assert ours.shape == exact.shape, f"{tensor} has shape {tuple(ours.shape)}, the reference's is {tuple(exact.shape)}"
    wide = ours.dtype == exact.dtype
    assert wide or ours.dtype == plain.dtype, f"{tensor} has dtype {ours.dtype}, the reference's is {plain.dtype}"
    if not ours.numel():
        return Error(tensor, 0.0, 0.0)
    if not ours.is_floating_point():
        return Error(tensor, float((ours != exact).sum()), 0.0)
    rounded = exact.to(ours.dtype).double()
    value, exact = ours.double(), exact.double()
    finite = rounded.isfinite()
    kept = finite & plain.isfinite()
    nearby = [(p.double(), e.double()) for p, e in nearby]
    wrong = max(_largest(p - e, kept & p.isfinite() & e.isfinite()) for p, e in ((plain.double(), exact), *nearby))
    if wide:
        wrong *= 16 * torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    info = torch.finfo(ours.dtype)
    rounding = max(info.eps * max(_largest(exact, kept), info.tiny), *(_largest(e - exact, kept & e.isfinite()) for _, e in nearby), 0.0)
    limit = times * wrong + rounding + torch.finfo(torch.float64 if wide else torch.float32).eps ** 2 * largest
    same = torch.where(rounded.isnan(), value.isnan(), value == rounded)
    if not same[~finite].all() or not value[kept].isfinite().all():
        return Error(tensor, float("inf"), limit)
    return Error(tensor, _largest(value - exact, kept), limit)


def nudged(x, seed):
    """x with each element moved by a rounding or not at all."""
    steps = torch.randint(-1, 2, x.shape, generator=torch.Generator().manual_seed(seed)).to(x.device)
    return (x.double() * (1 + torch.finfo(x.dtype).eps * steps)).to(x.dtype)


def _largest(x, where):
    return torch.where(where, x, 0.0).abs().max().item() if x.numel() else 0.0
