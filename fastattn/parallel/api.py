"""`attention()` over a sequence whose shards lie on the ranks of a mesh dimension."""

import torch
from torch.compiler import is_dynamo_compiling

from ..api import misnamed
from ..checks import check_flag
from ..masks.block_mask import BlockMask
from ..masks.intervals import Mask
from ..torch_internals import is_traced
from . import graphs
from .costs import Machine
from .running import attend, check_dims, groups_of
from .shards import Shards


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *misplaced,
    mesh,
    dim: str | tuple[str, str] = "cp",
    schedule: str | None = None,
    shards: str | Shards = "contiguous",
    shards_k: str | Shards | None = None,
    mask: Mask | BlockMask | torch.Tensor | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] | None = None,
    softmax_scale: float | torch.Tensor | None = None,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    skip_negligible: bool | None = None,
    return_lse: bool = False,
    backend: str | None = None,
    timeout: float | None = None,
    machine: Machine | None = None,
    debug: bool = False,
    **unknown,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`fastattn.attention` of a sequence of which every rank holds a part: exact, forward and backward.

    q, k, v   this rank's rows [batch, num_heads, local_seqlen, head_dim], as in `fastattn.attention`; ranks may have
              different numbers of rows, and none
    mesh      a torch.distributed DeviceMesh; dim: the dimension along which the sequence is cut, or two, (outer,
              inner), whose ranks count outer * size of inner + inner
    schedule  "ring": keys and values pass around while blocks are computed; "all_gather": each rank gets all keys that
              it needs at once; "all_to_all": each rank gets all rows of some heads; "ring+all_to_all", for two
              dimensions: heads are exchanged along inner, keys pass around along outer. None: what `explain` says
    shards    which rows a rank holds: "contiguous" (in the order of the ranks, any lengths), "zigzag", or `Shards`;
              shards_k: of k and v, if others than of q; None: those of q, "contiguous" ones of their own lengths
    mask      of the local queries against all keys, whose positions count in the whole sequence: a `Mask`, whose
              k_start and k_end are [batch|1, num_heads|1, local_seqlen|1], a `BlockMask` or a bool tensor
              [batch|1, num_heads|1, local_seqlen, seqlen_k]. `shard` cuts one for the whole sequence
    bias      [batch|1, num_heads|1, local_seqlen|1, seqlen_k|1]
    alibi_slopes, sinks, softmax_scale  equal on all ranks
    timeout   seconds to wait for another rank; None: the process group's own timeout
    machine   what the cost model assumes; None: `Machine()`
    debug     compare all arguments that must be equal, with their values, and not only hashes of what they are

    causal, window_size, softcap, return_lse, skip_negligible and backend are those of `fastattn.attention`, with the
    lengths of the whole sequence. dropout_p and seed drop the weights that one process drops: their bits are keyed by
    position; seed=None takes the one that the first rank draws from torch's generator, of which every rank draws.

    Returns out [batch, num_heads, local_seqlen, head_dim_v], or (out, lse), of the local queries. Equal to one
    process's to rounding; the bits depend on shards and schedule and never on timing. Gradients of q, k, v are those of
    the whole sequence's loss; those of alibi_slopes, bias, sinks and softmax_scale are of the local queries (with heads
    exchanged, of the local heads), to be summed over the ranks as those of weights are. Every rank has to call, and
    to run backward if one does.

    Memory: O(local_seqlen), and of other ranks the keys and values of two shards (of all, for all_gather). What no
    query of a rank sees is neither computed nor sent to it.

    Raises what `fastattn.attention` raises; `ParallelError` if another rank has died, does not answer in time or was
    called otherwise, on every rank. Method: Ring Attention, arXiv 2310.01889; DeepSpeed-Ulysses, arXiv 2309.14509.
    """
    if misplaced or unknown:
        raise misnamed("fastattn.parallel.attention", misplaced, unknown)
    options = {
        "mask": mask, "causal": causal, "window_size": window_size, "softmax_scale": softmax_scale, "softcap": softcap,
        "alibi_slopes": alibi_slopes, "bias": bias, "sinks": sinks, "dropout_p": dropout_p, "seed": seed,
        "skip_negligible": skip_negligible, "return_lse": return_lse, "backend": backend,
    }  # fmt: skip
    others = {
        "schedule": schedule, "shards": shards, "shards_k": shards_k, "machine": machine or Machine(),
        "debug": check_flag("debug", debug),
    }  # fmt: skip
    if is_dynamo_compiling() or is_traced():
        groups = [mesh.get_group(x).group_name for x in check_dims(mesh, dim)]
        out, lse = graphs.attend(groups, timeout, (q, k, v), options, others)
    else:
        out, lse = attend(groups_of(mesh, dim, timeout), (q, k, v), options, others)
    return (out, lse) if return_lse else out
