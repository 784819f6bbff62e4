"""The operators of `attention_csr`."""

from ..calls import current_backend
from ..layouts.csr_arguments import bind
from ..layouts.edges import Edges
from ..plans import Bound
from . import library


def _bind(q, k, v, options: dict, needs_grad: bool) -> Bound:
    """The call of `attention_csr` that these options are."""
    get = options.get
    return bind(
        q, k, v, options["indptr"], options["indices"], edge_bias=get("bias"), softmax_scale=get("softmax_scale"),
        return_lse=get("return_lse", False), backend=get("backend") or current_backend(), needs_grad=needs_grad,
    )  # fmt: skip


attention_csr = library.define(
    library.Layout(
        names=("attention_csr", "csr_forward", "csr_forward_train", "csr_backward"),
        options="Tensor indptr, Tensor indices, Tensor? bias=None, float? softmax_scale=None, bool return_lse=False, "
        "str? backend=None",
        tensors=("indptr", "indices", "bias"),
        learned=("bias",),
        lists=(),
        bind=_bind,
        terms=Edges,
        kind="csr",
        neutral=dict.fromkeys(Edges._fields),
    )
)
