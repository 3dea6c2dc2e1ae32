"""Inputs of a timed call: random tensors, copies of them, and the call on them, whole or in independent parts."""

from dataclasses import dataclass

import torch

from ..core.case import Array, Integers
from ..testing.budget import nudged


def make(arguments, dtype, device, grad=False, seed=0):
    """A case's arguments with tensors in place of Array and Integers: standard normal, and uniform over their range."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, spec in arguments.items():
        if isinstance(spec, Array):
            x = torch.randn(spec.shape, generator=generator) * spec.scale
            if spec.within:
                x = spec.within[0] + (spec.within[1] - spec.within[0]) * torch.sigmoid(x)
            x = x.to(device, getattr(torch, _wider(spec.dtype, dtype)))
            x = x.movedim(1, -1).contiguous().movedim(-1, 1) if spec.last else x
            made[name] = x.requires_grad_(grad and spec.grad)
        elif isinstance(spec, Integers):
            made[name] = torch.randint(spec.low, spec.high + 1, spec.shape, generator=generator).to(device, getattr(torch, spec.dtype))
        else:
            made[name] = spec
    return made


def _wider(fixed, dtype):
    return dtype if fixed is None or dtype == "float64" else fixed


@dataclass(frozen=True)
class Call:
    """function(**arguments), and with `dout` (one tensor per output) its gradients in every argument that requires one."""

    arguments: dict
    dout: tuple | None = None

    def __call__(self, function):
        """Outputs, then gradients."""
        outs = function(**self.arguments)
        outs = outs if isinstance(outs, tuple) else (outs,)
        if self.dout is None or not self.wanted():
            return outs
        grads = torch.autograd.grad(outs, [self.arguments[name] for name in self.wanted()], self.dout)
        return (*(y.detach() for y in outs), *grads)

    def wanted(self):
        return [name for name, x in self.tensors().items() if x.requires_grad]

    def tensors(self):
        return {name: x for name, x in self.arguments.items() if isinstance(x, torch.Tensor)}

    def nbytes(self):
        return sum(x.nbytes for x in (*self.tensors().values(), *(self.dout or ())))

    def copy(self, dtype=None):
        """The same values in memory of their own; floating tensors in `dtype` if one is given."""
        arguments = {name: self._copy(x, dtype) if isinstance(x, torch.Tensor) else x for name, x in self.arguments.items()}
        return Call(arguments, self.dout and tuple(self._copy(d, dtype) for d in self.dout))

    def nudged(self, seed):
        """Nearby arguments: each element of floating tensors moved by a rounding or not at all."""
        floating = {name: x for name, x in self.tensors().items() if x.is_floating_point()}
        moved = {name: nudged(x.detach(), seed).requires_grad_(x.requires_grad) for name, x in floating.items()}
        return Call({**self.arguments, **moved}, self.dout)

    @staticmethod
    def _copy(x, dtype):
        made = x.detach().clone()
        return (made.to(dtype) if dtype and x.is_floating_point() else made).requires_grad_(x.requires_grad)

    def parts(self, case):
        """Number of independent parts that `by_parts` makes."""
        floating = [name for name, x in self.tensors().items() if x.is_floating_point()] or list(self.tensors())
        total = 1
        for axis, names in enumerate((case.batched, case.heads)):
            if set(floating) <= set(names):
                total *= self.arguments[floating[0]].shape[axis]
        return total

    def by_parts(self, function, case, dtype=None, axis=0):
        """As calling it (in `dtype`, if given), but one sample and one head at a time where the case says that these are independent,
        so that a reference that stores every score fits in memory."""
        if axis == 2:
            return self.copy(dtype)(function)
        names = (case.batched, case.heads)[axis]
        floating = [name for name, x in self.tensors().items() if x.is_floating_point()] or list(self.tensors())
        size = self.arguments[floating[0]].shape[axis] if set(floating) <= set(names) else 1
        if size <= 1:
            return self.by_parts(function, case, dtype, axis + 1)
        results = [self._part(names, axis, i).by_parts(function, case, dtype, axis + 1) for i in range(size)]
        return tuple(torch.cat(rows, axis) for rows in zip(*results, strict=True))

    def _part(self, names, axis, i):
        def cut(x):
            return x.detach().narrow(axis, i, 1).requires_grad_(x.requires_grad)

        arguments = {name: cut(x) if name in names and isinstance(x, torch.Tensor) else x for name, x in self.arguments.items()}
        return Call(arguments, self.dout and tuple(cut(d) for d in self.dout))
