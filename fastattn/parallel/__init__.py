"""Attention over sequences that no machine holds, on torch.distributed; see docs/parallel.md."""

from .api import attention
from .applying import apply
from .choice import explain
from .costs import Machine
from .decoding import decode
from .peers import ParallelError, sent_bytes
from .sharding import shard, unshard
from .shards import Shards

__all__ = [
    "Machine", "ParallelError", "Shards", "apply", "attention", "decode", "explain", "sent_bytes", "shard", "unshard",
]  # fmt: skip
