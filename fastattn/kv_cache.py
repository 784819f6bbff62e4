"""`KVCache`: keys and values of sequences that grow, for people who write their own loop of generation."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .checks import check_int, check_tensors, one_line
from .layouts.kvcache import attention_with_kvcache
from .layouts.quantization import quantized
from .problem import FLOATS

_DTYPES = (*[getattr(torch, name) for name in FLOATS], torch.int8)


class QuantizationError(NamedTuple):
    """Of values that an int8 cache would hold: the largest and the root mean square of their rounding errors, each
    relative to the same of the values."""

    largest: float
    rms: float


def quantization_error(x: torch.Tensor) -> QuantizationError:
    """What rounding rows [..., dim] to int8, as an int8 `KVCache` does, changes in float x. O(size of x) memory."""
    check_tensors(x=x)
    numbers, factors = quantized(x)
    exact = x.double()
    errors = numbers.double() * factors[..., None].double() - exact
    tiny = torch.finfo(torch.float64).tiny
    return QuantizationError(
        (errors.abs().max() / exact.abs().max().clamp(min=tiny)).item(),
        (errors.square().mean().sqrt() / exact.square().mean().sqrt().clamp(min=tiny)).item(),
    )


class _Rows:
    """The memory of one or several caches: [entries or pages, num_heads_k, rows, dim], with the factors of int8 rows,
    and how many sequences hold each page."""

    def __init__(self, entries: int, num_heads_k: int, rows: int, dims: tuple[int, int], dtype: torch.dtype):
        self.k, self.v = (torch.empty(entries, num_heads_k, rows, dim, dtype=dtype) for dim in dims)
        self.k_scale = self.v_scale = None
        if dtype == torch.int8:
            self.k_scale, self.v_scale = (torch.empty(entries, num_heads_k, rows) for _ in range(2))
        self.holders = [0] * entries
        self.free = list(range(entries))[::-1]

    def tensors(self) -> list[torch.Tensor]:
        return [x for x in (self.k, self.v, self.k_scale, self.v_scale) if x is not None]

    def release(self, page: int) -> None:
        self.holders[page] -= 1
        if self.holders[page] == 0:
            self.free.append(page)

    def take(self) -> int:
        page = self.free.pop()
        self.holders[page] = 1
        return page


class KVCache:
    """Keys and values of `batch` sequences, contiguous or in pages.

        cache = fastattn.KVCache(batch=2, num_heads_k=8, head_dim=128, capacity=4096, page_size=256)
        out = cache.attend(q, k, v)      # appends k, v, then attends: prompt and steps alike
        branch = cache.fork([0, 0, 1])   # three sequences that share the pages of these two

    capacity    most keys of a sequence
    head_dim_v  of the values; None: head_dim
    dtype       float32, bfloat16, float16, float64: that of q, k and v. Or int8: a row of k or v of a head is stored as
                integers and one factor, for q, k and v of float32, bfloat16 or float16; `quantization_error` tells what
                that costs
    page_size   None: one block of memory a sequence, at once. Else memory is taken in pages of so many keys
    num_pages   pages that all forks share; None: enough for `batch` sequences of `capacity` keys

    Memory is on the CPU: batch * num_heads_k * capacity * (head_dim + head_dim_v) elements (with num_pages, those of
    the pages), plus 8 bytes a key and head for int8. What raises leaves the cache as it was.
    """

    def __init__(
        self, batch: int, num_heads_k: int, head_dim: int, capacity: int, *, head_dim_v: int | None = None,
        dtype: torch.dtype = torch.float32, page_size: int | None = None, num_pages: int | None = None,
    ):  # fmt: skip
        for name, value in (("batch", batch), ("num_heads_k", num_heads_k), ("head_dim", head_dim)):
            check_int(name, value, 1)
        check_int("capacity", capacity, 1)
        if dtype not in _DTYPES:
            raise TypeError(f"dtype={dtype} must be one of {', '.join(map(str, _DTYPES))}")
        if num_pages is not None and page_size is None:
            raise ValueError(f"num_pages={num_pages} needs page_size=")
        dims = head_dim, check_int("head_dim_v", head_dim if head_dim_v is None else head_dim_v, 1)
        self.capacity, self.page_size = capacity, page_size
        self.lengths = [0] * batch
        """Keys that each sequence holds."""
        if page_size is None:
            self._rows, self._tables = _Rows(batch, num_heads_k, capacity, dims, dtype), None
        else:
            needed = -(-capacity // check_int("page_size", page_size, 1)) * batch
            pages = needed if num_pages is None else check_int("num_pages", num_pages, 1)
            self._rows, self._tables = _Rows(pages, num_heads_k, page_size, dims, dtype), [[] for _ in range(batch)]
            self._numbers = torch.zeros(
                batch, -(-capacity // page_size), dtype=torch.int64
            )  # of pages, as kernels read

    @property
    def batch(self) -> int:
        """How many sequences there are."""
        return len(self.lengths)

    @property
    def free_pages(self) -> int:
        """Pages that no sequence holds."""
        return len(self._rows.free) if self._tables is not None else 0

    def append(self, k: torch.Tensor, v: torch.Tensor, sequences: Sequence[int] | None = None, **rotary) -> None:
        """Writes k [batch, num_heads_k, new keys, head_dim] and v behind what `sequences` (None: all, in their order)
        hold. rotary: rotary_cos, rotary_sin, rotary_interleaved of `attention_with_kvcache`, which turn k."""
        check_tensors(k=k, v=v)
        if k.dim() != 4:
            raise ValueError(f"k has shape {tuple(k.shape)}; it must be [batch, num_heads_k, new keys, head_dim]")
        self.attend(k[:, :, :0], k, v, sequences, **rotary)

    def attend(
        self, q: torch.Tensor, k: torch.Tensor | None = None, v: torch.Tensor | None = None,
        sequences: Sequence[int] | None = None, **options,
    ):  # fmt: skip
        """Appends k and v, if they are given, and returns the attention of q [batch, num_heads, seqlen_q, head_dim]
        over what the sequences hold then. options: those of `attention_with_kvcache` that are no part of the cache."""
        chosen = self._chosen(sequences)
        new = k.shape[2] if isinstance(k, torch.Tensor) and k.dim() == 4 else 0
        for i in chosen:
            if self.lengths[i] + new > self.capacity:
                raise ValueError(
                    f"sequence {i} holds {self.lengths[i]} keys of capacity={self.capacity}: {new} more do not fit"
                )
        if new and len(set(chosen)) < len(chosen):
            raise ValueError(f"sequences={one_line(sequences)} must be different ones, or k would be appended twice")
        taken = self._make_room(chosen, new)
        places = {"cache_seqlens": torch.tensor([self.lengths[i] for i in chosen], dtype=torch.int64)}
        rows = self._rows
        if self._tables is not None:
            places["block_table"] = self._numbers if sequences is None else self._numbers[chosen]
        elif sequences is not None:
            places["cache_batch_idx"] = torch.tensor(chosen, dtype=torch.int64)
        try:
            found = attention_with_kvcache(
                q, rows.k, rows.v, k, v, **places, k_scale=rows.k_scale, v_scale=rows.v_scale, **options
            )
        except BaseException:
            self._give_back(taken)
            raise
        for i in chosen:
            self.lengths[i] += new
        return found

    def truncate(self, lengths: int | Sequence[int]) -> None:
        """Forgets all keys of each sequence but its first so many."""
        wanted = [lengths] * self.batch if isinstance(lengths, int) else list(lengths)
        if len(wanted) != self.batch:
            raise ValueError(f"lengths={one_line(lengths)} must be one int, or one for each of {self.batch} sequences")
        for i, (length, held) in enumerate(zip(wanted, self.lengths, strict=True)):
            if check_int(f"lengths[{i}]", length) > held:
                raise ValueError(f"lengths[{i}]={length} is more than the {held} keys that the sequence holds")
        for i, length in enumerate(wanted):
            self.lengths[i] = length
            if self._tables is not None:
                table = self._tables[i]
                for page in table[-(-length // self.page_size) :]:
                    self._rows.release(page)
                del table[-(-length // self.page_size) :]

    def reset(self, sequences: Sequence[int] | None = None) -> None:
        """Forgets all keys of `sequences` (None: all)."""
        chosen = set(self._chosen(sequences))
        self.truncate([0 if i in chosen else length for i, length in enumerate(self.lengths)])

    def fork(self, sequences: Sequence[int] | None = None) -> "KVCache":
        """A cache with these sequences (None: all, once each), which may repeat. With pages it shares those that are
        there, and a page is copied when the first of its holders writes to it; without, everything is copied. Its pages
        are free again when it is reset or garbage."""
        chosen = self._chosen(sequences)
        other = object.__new__(KVCache)
        other.capacity, other.page_size = self.capacity, self.page_size
        other.lengths = [self.lengths[i] for i in chosen]
        other._rows, other._tables = self._rows, None
        if self._tables is not None:
            other._tables, other._numbers = [list(self._tables[i]) for i in chosen], self._numbers[chosen]
            for page in (page for table in other._tables for page in table):
                self._rows.holders[page] += 1
            return other
        rows = object.__new__(_Rows)
        index = torch.tensor(chosen, dtype=torch.int64)
        for name, x in vars(self._rows).items():
            setattr(rows, name, x[index] if isinstance(x, torch.Tensor) else x)
        other._rows = rows
        return other

    def gathered(self, sequence: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(k, v) [num_heads_k, keys, dim] of a sequence, copied; of an int8 cache in float32."""
        (i,), found = self._chosen([sequence]), []
        for x, factors in ((self._rows.k, self._rows.k_scale), (self._rows.v, self._rows.v_scale)):
            parts = []
            for y in (x, factors):
                if y is not None and self._tables is not None:
                    y = y[torch.tensor(self._tables[i], dtype=torch.int64)].transpose(0, 1).flatten(1, 2)
                elif y is not None:
                    y = y[i]
                parts.append(y if y is None else y[:, : self.lengths[i]])
            rows, scales = parts
            found.append(rows.clone() if scales is None else rows * scales[..., None])
        return tuple(found)

    def __del__(self):
        if getattr(self, "_tables", None) is not None:
            for page in (page for table in self._tables for page in table):
                self._rows.release(page)

    def _chosen(self, sequences) -> list[int]:
        if sequences is None:
            return list(range(self.batch))
        chosen = sequences.tolist() if isinstance(sequences, torch.Tensor) else list(sequences)
        for i in chosen:
            if not 0 <= check_int("a sequence", i) < self.batch:
                raise ValueError(f"sequence {i} must be below batch={self.batch}")
        return chosen

    def _make_room(self, chosen: list[int], new: int) -> list[tuple[int, int | None]]:
        """Pages for `new` keys of each sequence, of its own; (sequence, page that it held there) of each."""
        if self._tables is None or not new:
            return []
        size, rows, taken = self.page_size, self._rows, []
        for i in chosen:
            table, length = self._tables[i], self.lengths[i]
            if length % size and rows.holders[table[-1]] > 1:
                taken.append((i, table[-1]))
            taken += [(i, None)] * (-(-(length + new) // size) - len(table))
        if len(taken) > len(rows.free):
            raise RuntimeError(
                f"{len(taken)} pages are needed and {len(rows.free)} of {len(rows.holders)} are free: reset or "
                "truncate sequences, or make the cache with num_pages= more"
            )
        for i, shared in taken:
            page = rows.take()
            if shared is None:
                self._tables[i].append(page)
            else:
                for x in rows.tensors():
                    x[page] = x[shared]
                self._tables[i][-1] = page
                rows.release(shared)
            self._numbers[i, len(self._tables[i]) - 1] = page
        return taken

    def _give_back(self, taken: list[tuple[int, int | None]]) -> None:
        """Undo `_make_room` where nothing was written; a copy of a shared page may stay."""
        for i, shared in reversed(taken):
            if shared is None:
                self._rows.release(self._tables[i].pop())
