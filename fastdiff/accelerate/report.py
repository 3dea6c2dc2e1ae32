"""What `accelerate` did, as data and as a table."""

from dataclasses import dataclass, field

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text


@dataclass
class Swapped:
    """A replaced module. With an example: largest absolute error of its output on the same input, the same relative to the largest
    output, and the seconds it took before and after, summed over its calls in one run of the model."""

    name: str
    kind: str
    note: str | None = None
    error: float | None = None
    relative: float | None = None
    time_before: float | None = None
    time_after: float | None = None


@dataclass
class Kept:
    """A module left alone (or a count of them, for classes without a rule), and why."""

    name: str
    kind: str
    reason: str


@dataclass
class Report:
    """replaced, kept; with an example the model's own largest error, relative error and seconds per run before and after."""

    replaced: list = field(default_factory=list)
    kept: list = field(default_factory=list)
    error: float | None = None
    relative: float | None = None
    time_before: float | None = None
    time_after: float | None = None

    @property
    def measured(self):
        return self.time_before is not None

    def print(self, console=None):
        (console or Console()).print(self)

    def __rich__(self):
        parts = [self._replaced() if self.replaced else Text("Nothing was replaced: the model is as it was.")]
        if self.kept:
            table = Table("left alone", "class", "why", title_justify="left")
            for row in self.kept:
                table.add_row(row.name, row.kind, row.reason)
            parts.append(table)
        return Group(*parts)

    @staticmethod
    def _figures(r):
        if r.time_before is None:
            return "not run", "", "", "", ""
        return (f"{r.error:.1e}", f"{r.relative:.1e}", f"{1e3 * r.time_before:.2f}", f"{1e3 * r.time_after:.2f}",
                f"{r.time_before / r.time_after:.2f}")

    def _replaced(self):
        table = Table("replaced", "class", show_footer=self.measured)
        if self.measured:
            table.columns[0].footer = "the whole model"
            for header, footer in zip(("max error", "relative", "ms before", "ms after", "ratio"), self._figures(self), strict=True):
                table.add_column(header, footer=footer, justify="right")
        noted = any(row.note for row in self.replaced)
        if noted:
            table.add_column("note")
        for row in self.replaced:
            table.add_row(row.name, row.kind, *(self._figures(row) if self.measured else ()), *((row.note or "",) if noted else ()))
        return table
