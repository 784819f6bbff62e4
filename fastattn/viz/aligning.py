"""`align()`: which frames of an input belong to which token, from cross-attention."""

import torch

from .weights import check_weights


def align(weights: torch.Tensor) -> torch.Tensor:
    """The division of the frames among the tokens, in order, at which the weights agree best.

    weights  [tokens, frames] or [heads, tokens, frames], float, 0 ... 1; heads are averaged; frames >= tokens

    Returns int64 [tokens + 1]: token t has the frames from borders[t] up to borders[t + 1], at least one; the first
    border is 0, the last the number of frames. Of all such divisions it is one with the largest sum of scores, where
    a score is the weight less its mean over the tokens, in standard deviations of its frame, so that frames which
    every token looks at do not count. O(tokens * frames) time and memory. Raises TypeError or ValueError that names
    the argument. Method: monotonic alignment search of Glow-TTS (arXiv 2005.11129, section 3.1), with scores as
    openai-whisper normalises cross-attention for its word times.
    """
    weights = check_weights("weights", weights, "heads tokens frames", "tokens frames").double()
    scores = weights.reshape(-1, *weights.shape[-2:])
    if scores.shape[1] > 1:
        spread = scores.std(1, correction=0, keepdim=True)
        scores = (scores - scores.mean(1, keepdim=True)) / spread.masked_fill(spread == 0.0, 1.0)
    scores = scores.mean(0)
    tokens, frames = scores.shape
    if frames < tokens:
        raise ValueError(f"weights have {frames} frames for {tokens} tokens; each token needs one")
    best = torch.full((tokens,), -torch.inf, dtype=torch.float64)  # of a division so far that ends with this token
    best[0] = scores[0, 0]
    begins = torch.zeros(frames, tokens, dtype=torch.bool)  # whether the token begins with this frame
    for frame in range(1, frames):
        before = torch.cat([best.new_tensor([-torch.inf]), best[:-1]])
        begins[frame] = before > best
        best = torch.maximum(best, before) + scores[:, frame]
    borders = [frames]
    token, begins = tokens - 1, begins.tolist()
    for frame in range(frames - 1, 0, -1):
        if token > 0 and begins[frame][token]:
            borders.append(frame)
            token -= 1
    return torch.tensor([0, *reversed(borders)])
