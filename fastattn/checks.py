"""What is asked of arguments that are no tensors; errors name the argument, its value and the rule."""

import math

import torch


def one_line(value) -> str:
    """`value` for an error message: a tensor by shape and dtype, anything else by its repr, short and on one line."""
    if isinstance(value, torch.Tensor):
        return f"tensor(shape={tuple(value.shape)}, dtype={value.dtype})"
    if isinstance(value, (tuple, list)) and any(isinstance(x, torch.Tensor) for x in value):
        return "(" + ", ".join(map(one_line, value)) + ")"
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else text[:77] + "..."


def check_real(name: str, value) -> float:
    """`value` as a float; TypeError unless an int or a float (True is 1.0), ValueError unless finite."""
    if isinstance(value, torch.Tensor):
        raise TypeError(f"{name} is a tensor of shape {tuple(value.shape)}; it must be a float (use .item())")
    if not isinstance(value, (int, float)):
        raise TypeError(f"{name}={one_line(value)} must be a float")
    try:
        value = float(value)
    except OverflowError:
        value = math.inf
    if not -math.inf < value < math.inf:  # which Dynamo traces, as it does not math.isfinite
        raise ValueError(f"{name}={value!r} must be finite")
    return value


def check_flag(name: str, value, hint: str = "") -> bool:
    """`value` as a bool; TypeError unless True, False, 1, 0, or None for False."""
    if value is None or (isinstance(value, int) and value in (0, 1)):
        return bool(value)
    raise TypeError(f"{name}={one_line(value)} must be True or False{hint}")


def check_int(name: str, value, least: int = 0) -> int:
    """`value` itself; TypeError unless an int, ValueError below `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={one_line(value)} must be an int")
    if value < least:
        raise ValueError(f"{name}={value} must be >= {least}")
    return value


def check_tensors(**arguments) -> None:
    """TypeError that names the first argument which is no tensor."""
    for name, value in arguments.items():
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def dtype_name(dtype: torch.dtype) -> str:
    """ "float32" of torch.float32."""
    return str(dtype).removeprefix("torch.")


def broadcasts(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    """Whether a tensor of `shape` broadcasts to `target`."""
    aligned = zip(reversed(shape), reversed(target), strict=False)
    return len(shape) <= len(target) and all(size in (1, full) for size, full in aligned)


def refuse_subclasses(*tensors: torch.Tensor) -> None:
    """TypeError for kinds of tensors that no kernel knows what to do with."""
    for x in tensors:
        if x.is_nested:
            raise TypeError(
                "nested tensors are not supported here: fastattn.attention takes jagged ones (layout=torch.jagged); "
                "pad others and pass mask=fastattn.Mask.lengths(...)"
            )
        if type(x).__name__ == "DTensor":
            raise TypeError(
                "a DTensor is not supported: no rule says how attention is sharded; call x.to_local() and shard over "
                "batch or heads"
            )


def check_one_device(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """ValueError unless all three are on the same device."""
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k, v are on {q.device}, {k.device}, {v.device}; they must be on one device")
