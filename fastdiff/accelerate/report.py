"""What `accelerate` did, as data and as a table."""

from dataclasses import dataclass, field

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text


@dataclass
class Figures:
    """With an example: the largest difference of the output on the same input, relative to the largest output; that of the gradients of
    inputs and parameters (None where there are none); seconds without gradients and peak bytes of tensors made meanwhile, before and after;
    where the model was in training mode, seconds of forward and backward.
    """

    error_forward: float | None = None
    error_backward: float | None = None
    time_before: float | None = None
    time_after: float | None = None
    memory_before: int | None = None
    memory_after: int | None = None
    step_before: float | None = None
    step_after: float | None = None

    def cells(self, steps):
        """Under `headers`."""
        if self.time_before is None:
            return "not run", *[""] * (len(headers(steps)) - 1)
        backward = "" if self.error_backward is None else f"{self.error_backward:.1e}"
        memory = ("" if m is None else f"{m / 2**20:.2f}" for m in (self.memory_before, self.memory_after))
        step = _times(self.step_before, self.step_after) if steps else ()
        return f"{self.error_forward:.1e}", backward, *_times(self.time_before, self.time_after), *step, *memory


def _times(before, after):
    return ("",) * 3 if before is None else (f"{1e3 * before:.2f}", f"{1e3 * after:.2f}", f"{before / after:.2f}")


def headers(steps):
    """The table's columns; steps: whether training steps were timed."""
    return ("error forward", "backward", "ms before", "after", "ratio", *(("step before", "after", "ratio") if steps else ()),
            "MiB before", "after")


@dataclass
class _Module:
    name: str
    kind: str
    note: str | None = None


@dataclass
class Swapped(Figures, _Module):
    """A replaced module; its seconds are summed over its calls in one run of the model."""


@dataclass
class Kept:
    """A module left alone (or a count of them, for classes without a rule), and why."""

    name: str
    kind: str
    reason: str


@dataclass
class Report(Figures):
    """replaced, kept, the whole model's figures, and share_dense: of the plain model's time, in products with weights and convolutions,
    which no rule makes faster.
    """

    replaced: list = field(default_factory=list)
    kept: list = field(default_factory=list)
    share_dense: float | None = None

    @property
    def measured(self):
        return self.time_before is not None

    @property
    def stepped(self):
        return self.step_before is not None

    def print(self, console=None):
        (console or Console()).print(self)

    def __rich__(self):
        parts = [self._replaced() if self.replaced else Text("Nothing was replaced: the model is as it was.")]
        if self.kept:
            table = Table("left alone", "class", "why", title_justify="left")
            alike = {}
            for row in self.kept:
                alike.setdefault((row.kind, row.reason), []).append(row.name)
            for (kind, reason), names in alike.items():
                table.add_row(names[0] + f" and {len(names) - 1} more" * (len(names) > 1), kind, reason)
            parts.append(table)
        if self.share_dense is not None:
            most = f"at most {1 / self.share_dense:.2f} times" if self.share_dense > 0.005 else "any number of times"
            parts.append(Text(f"Of the plain model's {1e3 * self.time_before:.2f} ms {self.share_dense:.0%} are products with weights and "
                              f"convolutions, which stay as they are: with all else free it would be {most} as fast."))
        return Group(*parts)

    def _replaced(self):
        table = Table("replaced", "class", show_footer=self.measured)
        if self.measured:
            table.columns[0].footer = "the whole model"
            for header, footer in zip(headers(self.stepped), self.cells(self.stepped), strict=True):
                table.add_column(header, footer=footer, justify="right")
        noted = any(row.note for row in self.replaced)
        if noted:
            table.add_column("note")
        for row in self.replaced:
            table.add_row(row.name, row.kind, *(row.cells(self.stepped) if self.measured else ()), *((row.note or "",) if noted else ()))
        return table
