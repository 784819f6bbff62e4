"""What became of the attention calls of a model: counts for each module, as a table and as data."""

import threading
from typing import NamedTuple


class ReportRow(NamedTuple):
    """Calls that one module made and that went one way.

    module   its name in the model
    calls    how many
    kernel   the kernel of fastattn that ran; "torch" where torch's own did
    why      why fastattn did not compute them, "" where it did
    seconds  wall time of all of them together, forward passes only
    share    of the time spent in the model's forward, in [0, 1]
    example  the latest of them: its `Problem` as text, or torch's function
    """

    module: str
    calls: int
    kernel: str
    why: str
    seconds: float
    share: float
    example: str


class Report:
    """Rows by module, in the order of their first calls. `str` gives a table, `data` plain lists and numbers.

    rows        a tuple of `ReportRow`
    silent      names of modules that were claimed and made no attention call themselves
    skipped     name of a module that could not be claimed -> why
    seconds     wall time of the model's forward so far
    """

    def __init__(self, rows: tuple[ReportRow, ...], silent: tuple[str, ...], skipped: dict[str, str], seconds: float):
        self.rows, self.silent, self.skipped, self.seconds = rows, silent, skipped, seconds

    @property
    def data(self) -> dict:
        """The report as JSON takes it."""
        rows = [row._asdict() for row in self.rows]
        return {"rows": rows, "silent": list(self.silent), "skipped": self.skipped, "seconds": self.seconds}

    def __str__(self) -> str:
        head = ("module", "calls", "kernel", "ms", "share", "call or reason")
        lines = [
            (row.module or "(the model)", str(row.calls), row.kernel, f"{1e3 * row.seconds:.2f}", f"{row.share:.0%}",
             row.why or row.example)
            for row in self.rows
        ]  # fmt: skip
        text = as_table([head, *lines]) if lines else "no attention call has been made in this model"
        taken = sum(row.calls for row in self.rows if not row.why)
        total = sum(row.calls for row in self.rows)
        text += f"\n{taken} of {total} calls on fastattn" if total else ""
        if not total and self.silent:
            text += f"; {len(self.silent)} modules were asked (calls in compiled graphs are not seen here)"
        return text + "".join(f"\nnot reached: {name}: {why}" for name, why in self.skipped.items())

    __repr__ = __str__


def as_table(lines: list[tuple[str, ...]]) -> str:
    """Lines of cells in columns, the last one as long as it is."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)][:-1]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[-1]]) for line in lines
    )


class Counts:
    """Calls as they happen, from any thread."""

    def __init__(self):
        self._lock = threading.Lock()
        self._counts: dict[tuple[str, str, str], list] = {}
        self.inside = 0  # nanoseconds in the model's forward

    def add(self, module: str, kernel: str, why: str, nanoseconds: int, example) -> None:
        key = module, kernel, why
        with self._lock:
            count = self._counts.setdefault(key, [0, 0, None])
            count[0] += 1
            count[1] += nanoseconds
            count[2] = example

    def left(self, nanoseconds: int) -> None:
        with self._lock:
            self.inside += nanoseconds

    def rows(self) -> tuple[ReportRow, ...]:
        with self._lock:
            counts = [(key, tuple(count)) for key, count in self._counts.items()]
        return tuple(
            ReportRow(
                module, calls, kernel, why, 1e-9 * spent, spent / self.inside if self.inside else 0.0,
                str(example),
            )
            for (module, kernel, why), (calls, spent, example) in counts
        )  # fmt: skip
