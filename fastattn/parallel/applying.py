"""`apply()`: a causal language model of transformers on several ranks. transformers is imported when it is called."""


def apply(
    model, mesh, dim: str | tuple[str, str] = "cp", *, shards: str = "zigzag", schedule: str | None = None,
    timeout: float | None = None,
):  # fmt: skip
    """From now on each call of `model`, a causal transformers model, takes whole sequences on every rank and computes
    this rank's rows: tokens, positions and labels are cut, attention is `fastattn.parallel.attention`.

    mesh, dim, shards, schedule, timeout   as in `attention`; shards by name

    Calls take input_ids [batch, seqlen] and perhaps position_ids, attention_mask (padding on the right alone) and
    labels. Logits are of the local rows (`unshard(logits, seq_dim=1)` puts them together). The loss is this rank's
    share: its sum over the ranks is the loss of one process, and so are gradients. Padded tokens compute something
    that no other token sees.

    Returns a handle whose `remove()` undoes it. Raises ImportError without transformers, `UnsupportedError` for models
    and arguments that it does not take: caches, packed sequences, other masks than causal ones and sliding windows.
    """
    from .models import Applied

    if shards not in ("contiguous", "zigzag"):
        raise ValueError(f"shards={shards!r} must be 'contiguous' or 'zigzag': lengths change from call to call")
    return Applied(model, {"mesh": mesh, "dim": dim, "schedule": schedule, "timeout": timeout}, shards)
