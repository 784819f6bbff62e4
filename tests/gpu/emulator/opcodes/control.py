"""Barriers. Branches and returns end a block: the machine takes them."""

from ..faults import Unknown


def _barrier(instruction, modifiers):
    if modifiers == ("sync",) and [x.text for x in instruction.operands] == ["0"]:
        return lambda machine: machine.barrier()
    if modifiers == ("warp", "sync") and [x.text for x in instruction.operands] == ["-1"]:
        return lambda machine: machine.require_whole_warps()
    raise Unknown(str(instruction))


STEPS = {"bar": _barrier}
