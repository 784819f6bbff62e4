"""How an int8 cache holds a row."""

import torch


def quantized(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [..., dim] as int8 -127 ... 127, and the float32 factors [...] that give them back; NaN where a row is not
    finite."""
    rows = rows.float()
    factors = rows.abs().amax(-1) / 127.0
    finite = torch.isfinite(rows).all(-1)
    divisors = torch.where(finite & (factors > 0), factors, 1.0)[..., None].double()
    numbers = torch.where(finite[..., None], (rows.double() / divisors).round(), 1.0)
    return numbers.to(torch.int8), factors.masked_fill(~finite, torch.nan)
