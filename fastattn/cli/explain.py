"""`python -m fastattn explain`: `fastattn.explain` of a call that is described in words."""

from .. import dispatch
from ..api import bind
from . import shapes


def add_arguments(parser) -> None:
    """See fastattn/cli/__init__.py."""
    parser.add_argument("shape", type=shapes.shape, metavar=shapes.METAVAR, help="as in 1,32,8,4096,4096,128")
    parser.add_argument("--dtype", default="float32", choices=shapes.DTYPES)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--window", nargs=2, type=int, metavar=("LEFT", "RIGHT"), help="-1: open")
    parser.add_argument("--softcap", type=float, default=0.0)
    parser.add_argument("--dropout-p", type=float, default=0.0)
    parser.add_argument("--training", action="store_true", help="with gradients of q, k and v")
    parser.add_argument("--backend", choices=dispatch.BACKENDS)


def run(options) -> int:
    """See fastattn/cli/__init__.py."""
    q, k, v = shapes.zeros(options.shape, options.dtype, "meta", options.training)  # of a device that need not be here
    window = options.window and tuple(None if side == -1 else side for side in options.window)
    bound = bind(
        q, k, v, causal=options.causal, window_size=window, softcap=options.softcap, dropout_p=options.dropout_p
    )
    print(dispatch.explain(bound.problem._replace(device=options.device), options.backend))
    return 0
