"""The types of functions whose result depends on return_lse; for type checkers alone."""

from typing import Literal, TypedDict, overload

from torch import Tensor
from typing_extensions import Unpack

from .masks import BlockMask, Mask
from .relative import RelativeBias

class Options(TypedDict, total=False):
    mask: Mask | BlockMask | Tensor | None
    causal: bool
    window_size: tuple[int | None, int | None] | None
    softmax_scale: float | Tensor | None
    softcap: float
    alibi_slopes: Tensor | None
    bias: Tensor | RelativeBias | None
    sinks: Tensor | None
    rotary: tuple[Tensor, Tensor] | None
    rotary_interleaved: bool
    dropout_p: float
    seed: int | None
    skip_negligible: bool | None
    backend: str | None

@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[False] = False, **options: Unpack[Options]
) -> Tensor: ...
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[True], **options: Unpack[Options]
) -> tuple[Tensor, Tensor]: ...
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool, **options: Unpack[Options]
) -> Tensor | tuple[Tensor, Tensor]: ...

class EdgeOptions(TypedDict, total=False):
    edge_bias: Tensor | None
    softmax_scale: float | None
    backend: str | None

@overload
def attention_csr(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indptr: Tensor,
    indices: Tensor,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[EdgeOptions],
) -> Tensor: ...
@overload
def attention_csr(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indptr: Tensor,
    indices: Tensor,
    *,
    return_lse: Literal[True],
    **options: Unpack[EdgeOptions],
) -> tuple[Tensor, Tensor]: ...
@overload
def attention_csr(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indptr: Tensor,
    indices: Tensor,
    *,
    return_lse: bool,
    **options: Unpack[EdgeOptions],
) -> Tensor | tuple[Tensor, Tensor]: ...
