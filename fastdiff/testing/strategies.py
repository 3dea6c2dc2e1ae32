"""Examples of a Case: sizes, memory layouts, dtypes and values, drawn by hypothesis and made into tensors from a seed."""

from dataclasses import dataclass, replace
from math import prod

import torch
from hypothesis import strategies as st

from ..core.case import Array, Case, Dim, Integers
from .budget import nudged

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EDGES = (0, 1, 31, 32, 33, 127, 128, 129)
LAYOUTS = ("contiguous", "transposed", "heads", "channels last", "sliced", "stepped", "offset", "expanded")
VALUES = ("normal", "offset 1e3", "one dominant", "tiny", "zeros")
MASKS = ("-inf", "-inf rows", "all -inf")


@dataclass(frozen=True)
class Example:
    """One call of an op. `arguments` makes its tensors anew each time, the same from the same seed; memory around them holds NaN.

    nudge: not 0 for nearby inputs, each element moved by at most a rounding.
    """

    case: Case
    dims: dict
    dtype: torch.dtype
    layouts: dict
    values: dict
    seed: int
    device: str = "cpu"
    nudge: int = 0

    def __str__(self):
        sizes = " ".join(f"{k}={v}" for k, v in self.dims.items())
        marks = [f"{name} {kind}" for kinds, usual in ((self.layouts, "contiguous"), (self.values, "normal"))
                 for name, kind in kinds.items() if kind != usual]
        return ", ".join([str(self.dtype).removeprefix("torch."), sizes, *marks, f"seed {self.seed}"])

    __repr__ = __str__

    def specs(self):
        return self.case.arguments(**self.dims)

    def arguments(self, dtype=None):
        """Keyword arguments of the call. With `dtype`: the same values, already rounded to the example's dtype, in another one."""
        generator = torch.Generator().manual_seed(self.seed)
        made = {}
        for name, spec in self.specs().items():
            if isinstance(spec, Array):
                x = _values(spec, self.values[name], generator).to(_dtype(spec, self.dtype))
                layout = self.layouts[name]
                if self.nudge:
                    if layout == "expanded":  # elements that share memory move each on its own
                        x, layout = lay_out(x, layout, "cpu").clone(), "offset"
                    x = nudged(x, self.nudge)
                made[name] = lay_out(x.to(dtype) if dtype else x, layout, self.device)
            elif isinstance(spec, Integers):
                x = torch.randint(spec.low, spec.high + 1, spec.shape, generator=generator).to(getattr(torch, spec.dtype))
                made[name] = lay_out(x, self.layouts[name], self.device)
            else:
                made[name] = spec
        return made

    def cotangents(self, outs):
        """One tensor per output, with its shape and dtype and some strides."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        kind = LAYOUTS[self.seed % len(LAYOUTS)]
        return tuple(lay_out(torch.randn(y.shape, generator=generator, dtype=torch.float64).to(self.dtype).to(y.dtype), kind, y.device)
                     for y in outs)

    def differentiable(self):
        """Names of the arguments that have a gradient."""
        return [name for name, spec in self.specs().items() if isinstance(spec, Array) and spec.grad]

    def tensors(self):
        return [name for name, spec in self.specs().items() if isinstance(spec, Array | Integers)]


def _dtype(spec, dtype):
    """float64 calls are float64 throughout: a fixed dtype is the least width."""
    return getattr(torch, spec.dtype) if spec.dtype and dtype != torch.float64 else dtype


def _values(spec, kind, generator):
    x = _unbounded(spec.shape, kind, generator)
    if spec.within is None:
        return x
    low, high = spec.within
    return low + (high - low) * torch.sigmoid(x)


def _unbounded(shape, kind, generator):
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    if kind == "offset 1e3":
        return x + 1e3
    if kind == "tiny":
        return x * 1e-6
    if kind == "zeros":
        return torch.zeros_like(x)
    if kind in MASKS:
        part = x.shape if kind == "-inf" else (*x.shape[:-1], 1)
        hidden = torch.rand(part, generator=generator) < (1.1 if kind == "all -inf" else 0.4)
        return x.masked_fill(hidden, -torch.inf)
    if kind == "one dominant" and x.numel():
        x.view(-1)[int(torch.randint(x.numel(), (), generator=generator))] = 60.0
    return x


def _order(kind, rank):
    """Axes from the slowest to the fastest in memory."""
    axes = list(range(rank))
    if kind == "transposed" and rank >= 2:
        return [*axes[:-2], axes[-1], axes[-2]]
    if kind == "heads" and rank == 4:
        return [0, 2, 1, 3]
    if kind == "channels last" and rank >= 3:
        return [0, *axes[2:], 1]
    return axes


def lay_out(x, kind, device):
    """The values of x in memory of this kind, amid memory that holds NaN (for integers, their greatest value)."""
    if kind == "expanded":
        wide = [i for i, n in enumerate(x.shape) if n > 1]
        if not wide:
            return lay_out(x, "offset", device)
        axis = wide[x.numel() % len(wide)]
        return lay_out(x.narrow(axis, 0, 1), "offset", device).expand(x.shape)
    step = 2 if kind == "stepped" else 1
    pad = 3 if kind == "sliced" else 0
    strides, width = [0] * x.dim(), step
    for axis in reversed(_order(kind, x.dim())):
        strides[axis] = width
        width *= max(x.shape[axis], 1) + pad
    # A multiple of 64 elements keeps the alignment of an allocation; an odd offset loses it.
    before = 65 if kind == "offset" else 64
    fill = torch.nan if x.is_floating_point() else torch.iinfo(x.dtype).max
    memory = torch.full((before + width + 64,), fill, dtype=x.dtype, device=device)
    return memory.as_strided(x.shape, strides, before).copy_(x)


def work(case, dims):
    """Elements of the arguments, or a hundredth of the flops where that is more."""
    specs = case.arguments(**dims)
    return max(sum(prod(s.shape) for s in specs.values() if isinstance(s, Array | Integers)), case.flops(**specs) // 100)


def shrink(case, dims, limit):
    """dims with its largest free sizes halved until the work is within `limit`."""
    dims = dict(dims)
    while work(case, dims) > limit:
        name = max((k for k, d in case.dims.items() if isinstance(d, Dim)), key=lambda k: dims[k] - case.dims[k].low, default=None)
        if name is None or dims[name] == case.dims[name].low:
            break
        dims[name] = max(case.dims[name].low, dims[name] // 2)
    return dims


def sizes(case, limit):
    """dims of the case: edges as often as the sizes between them, and no more than `limit` of work."""
    def size(d):
        if isinstance(d, Dim):
            edges = sorted({e for e in (*EDGES, d.low, d.high) if d.low <= e <= d.high})
            # An example is simplest with sizes of 2, not with the least: where few are drawn, the first is then not an empty one.
            return st.just(min(max(2, d.low), d.high)) | st.integers(d.low, d.high) | st.sampled_from(edges)
        return st.sampled_from(d.values)

    return st.fixed_dictionaries({name: size(d) for name, d in case.dims.items()}).map(lambda dims: shrink(case, dims, limit))


@st.composite
def examples(draw, case, *, dtypes=DTYPES, device="cpu", limit=1 << 17, extreme=True):
    """Examples of `case`. limit: most elements of all arguments. extreme=False: standard normal values only, for numerical derivatives."""
    dims = draw(sizes(case, limit))
    layouts, values = {}, {}
    for name, spec in case.arguments(**dims).items():
        if isinstance(spec, Array | Integers):
            layouts[name] = draw(st.sampled_from(LAYOUTS))
        if isinstance(spec, Array):
            kinds = VALUES + (MASKS if spec.masks else ())
            values[name] = draw(st.just("normal") | st.sampled_from(kinds)) if extreme else "normal"
    return Example(case, dims, draw(st.sampled_from(dtypes)), layouts, values, draw(st.integers(0, 999)), device)


def followed(case, dims):
    """(argument, axis) -> the Dim whose value is that axis' size: found by moving each Dim by one."""

    def shapes(d):
        return {k: s.shape for k, s in case.arguments(**d).items() if isinstance(s, Array | Integers)}

    base, axes = shapes(dims), {}
    for name, dim in case.dims.items():
        if isinstance(dim, Dim):
            moved = shapes(dims | {name: dims[name] + 1})
            for argument, shape in base.items():
                for axis, (size, other) in enumerate(zip(shape, moved.get(argument, shape), strict=True)):
                    if size == dims[name] and other == size + 1:
                        axes[argument, axis] = name
    return axes


def batch_axis(example):
    """(the Dim that counts samples, the arguments whose first axis it is), or (None, ()) for an op without."""
    axes = followed(example.case, example.dims)
    name = next((axes[a, 0] for a in example.case.batched if (a, 0) in axes), None)
    return name, tuple(a for (a, axis), dim in axes.items() if axis == 0 and dim == name)


def contiguous(example):
    return replace(example, layouts=dict.fromkeys(example.layouts, "contiguous"))
