"""Which schedule runs: by name, or the one that the cost model likes best; `explain` prints what it knows."""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch

from ..api import Explanation
from ..checks import check_int, one_line
from ..masks.intervals import Window, check_window, diagonal_bounds
from .costs import SCHEDULES, Cost, Machine, Sizes, cost
from .heads import refusal
from .shards import Shards, check_shards


class Setting(NamedTuple):
    """What a schedule is chosen by, equal on all ranks.

    dims      sizes of the mesh dimensions: (ranks,), or (outer, inner), of which the inner ranks exchange heads
    bounds    lo and hi of key - query
    has_rows  names of terms that hold a row for each query and all keys
    """

    sizes: Sizes
    shards_q: Shards
    shards_k: Shards
    dims: tuple[int, ...]
    bounds: tuple[int, int]
    has_rows: tuple[str, ...]
    machine: Machine

    def inner(self, schedule: str) -> int:
        """How many ranks exchange heads with each other."""
        return self.dims[-1] if "all_to_all" in schedule else 1

    def cost(self, schedule: str) -> Cost:
        """What a schedule costs that is not refused."""
        return cost(schedule, self.sizes, self.shards_q, self.shards_k, self.bounds, self.inner(schedule), self.machine)

    def refusal(self, schedule: str) -> str | None:
        """Why a schedule cannot run, None if it can."""
        if (schedule == "ring+all_to_all") != (len(self.dims) == 2):
            return f"it needs {'two mesh dimensions' if len(self.dims) == 1 else 'one mesh dimension'}"
        if "all_to_all" in schedule:
            return refusal(self.sizes.num_heads, self.sizes.num_heads_k, self.inner(schedule), self.has_rows)
        return None

    def reserve(self, schedule: str, found: Cost) -> str | None:
        """Why a schedule runs only if it is asked for by name, None if it may be chosen."""
        own = max(self.shards_q.lengths) * self.sizes.query_row
        if schedule == "all_gather" and found.memory > own:
            return f"keys are not short: {_bytes(found.memory)} beside {_bytes(own)} of q and out"
        return None


@lru_cache(maxsize=256)
def choose(setting: Setting, schedule: str | None) -> str:
    """`schedule` if it can run, else ValueError; None: the fastest by the model."""
    if schedule is not None:
        if (why := setting.refusal(schedule)) is not None:
            raise ValueError(f"schedule={schedule!r} is refused: {why}. {_allowed(setting)}")
        return schedule
    found = {name: setting.cost(name) for name in SCHEDULES if setting.refusal(name) is None}
    free = {name: x for name, x in found.items() if setting.reserve(name, x) is None}
    if not free:
        reasons = "; ".join(f"{name}: {setting.refusal(name)}" for name in SCHEDULES)
        raise ValueError(f"every schedule is refused: {reasons}")
    return min(free, key=lambda name: free[name].forward_seconds + free[name].backward_seconds)


def check_schedule(schedule) -> str | None:
    """`schedule` itself; ValueError unless a name or None."""
    if schedule is not None and not (isinstance(schedule, str) and schedule in SCHEDULES):
        raise ValueError(f"schedule={one_line(schedule)} must be one of {', '.join(SCHEDULES)}, or None: the model's")
    return schedule


def explain(
    *,
    ranks: int | tuple[int, int],
    seqlen: int,
    num_heads: int,
    head_dim: int,
    num_heads_k: int | None = None,
    head_dim_v: int | None = None,
    seqlen_k: int | None = None,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    causal: bool = False,
    window_size: tuple[int | None, int | None] | None = None,
    shards: str | Shards = "contiguous",
    schedule: str | None = None,
    machine: Machine | None = None,
) -> Explanation:
    """What each schedule would cost, and which one `attention` would run; needs no processes and no memory.

    ranks     (outer, inner) for a mesh of two dimensions
    seqlen    of the whole sequence; seqlen_k: of its keys, if there are others
    machine   what the model assumes; None: `Machine()`

    Bytes are what the schedule sends, exactly. Masks beside causal and window_size are not known here: they leave out
    more. Seconds are the model's: of each step the longer one of computing and transfer.
    """
    dims = tuple(check_int("ranks", x, 1) for x in (ranks if isinstance(ranks, tuple) else (ranks,)))
    setting = setting_of(
        dims, seqlen, seqlen if seqlen_k is None else seqlen_k, shards, causal, window_size, machine or Machine(),
        Sizes(
            batch, num_heads, num_heads if num_heads_k is None else num_heads_k, head_dim,
            head_dim if head_dim_v is None else head_dim_v, dtype.itemsize, max(dtype.itemsize, 4),
        ),
    )  # fmt: skip
    chosen = choose(setting, check_schedule(schedule))
    rows = [
        ("", "steps", "sent forward", "sent backward", "imbalance", "extra memory", "model forward", "backward", "")
    ]
    for name in SCHEDULES:
        if (why := setting.refusal(name)) is not None:
            rows.append((name, *[""] * 7, f"refused: {why}"))
            continue
        found = setting.cost(name)
        verdict = "runs" if name == chosen else setting.reserve(name, found)
        rows.append((
            name, str(found.steps), _bytes(max(found.forward_bytes)), _bytes(max(found.backward_bytes)),
            f"{found.imbalance:.2f}", _bytes(found.memory), f"{found.forward_seconds:.3g} s",
            f"{found.backward_seconds:.3g} s", verdict if name == chosen or verdict is None else f"by name: {verdict}",
        ))  # fmt: skip
    widths = [max(len(row[n] or "") for row in rows) for n in range(8)]
    lines = [
        "  ".join([x.ljust(w) for x, w in zip(row, widths, strict=False)] + [row[8] or ""]).rstrip() for row in rows
    ]
    kind = shards if isinstance(shards, str) else "given"
    head = f"ranks {' x '.join(map(str, dims))}, seqlen {seqlen}, {kind} shards; of a rank, the most of all ranks:"
    return Explanation("\n".join([head, *lines]))


def setting_of(dims, seqlen_q, seqlen_k, shards, causal, window_size, machine: Machine, sizes: Sizes) -> Setting:
    """The Setting of whole lengths, with shards by name or given."""
    ranks = 1
    for size in dims:
        ranks *= size

    def of(seqlen: int) -> Shards:
        if isinstance(shards, str):
            make = Shards.zigzag if shards == "zigzag" else Shards.contiguous
            return check_shards(shards, "shards", make(seqlen, ranks).lengths)
        if shards.ranks != ranks or shards.seqlen != seqlen:
            raise ValueError(f"shards are of {shards.ranks} ranks and {shards.seqlen} rows, not {ranks} and {seqlen}")
        return shards

    windows = (Window(None, 0),) if causal else ()
    windows += () if window_size is None else (Window(*check_window(window_size)),)
    bounds = diagonal_bounds(windows, seqlen_q, seqlen_k)
    return Setting(sizes, of(seqlen_q), of(seqlen_k), dims, bounds, (), machine)


def _allowed(setting: Setting) -> str:
    names: Sequence[str] = [name for name in SCHEDULES if setting.refusal(name) is None]
    return f"It can be {' or '.join(names)}" if names else "No schedule can run"


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError
