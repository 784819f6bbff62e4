"""Branches, waits, barriers."""

import re

import numpy as np

from ..parsing import EXEC, VCC


def _any(number: int):
    return lambda registers: registers.mask(number).any(1)


def _not(function):
    return lambda registers: ~function(registers)


def _scc(registers):
    return registers.scc[:, 0]


BRANCHES = {
    "s_branch": lambda registers: np.ones(registers.shape[0], bool),
    "s_cbranch_scc0": _not(_scc),
    "s_cbranch_scc1": _scc,
    "s_cbranch_vccz": _not(_any(VCC)),
    "s_cbranch_vccnz": _any(VCC),
    "s_cbranch_execz": _not(_any(EXEC)),
    "s_cbranch_execnz": _any(EXEC),
    "s_endpgm": None,
}
NOTHING = (
    "s_delay_alu", "s_clause", "s_nop", "s_sendmsg", "s_waitcnt_depctr", "buffer_gl0_inv", "s_setprio",
    "s_set_inst_prefetch_distance",
)  # fmt: skip
"""They order or hint what happens in order here anyway, or take registers back at the end."""
_COUNTERS = {"vmcnt": ("vector",), "lgkmcnt": ("local", "scalar"), "vscnt": ("stores",), "expcnt": ()}


def step(instruction, lanes):
    opcode = instruction.opcode
    if opcode in NOTHING:
        return lambda machine: None
    if opcode == "s_barrier":
        return lambda machine: machine.barrier()
    if opcode == "s_waitcnt":
        waits = [(name, int(left)) for name, left in re.findall(r"(\w+)\((\d+)\)", instruction.operands[0])]
        return _wait(waits)
    if opcode == "s_waitcnt_vscnt":
        return _wait([("vscnt", int(instruction.operands[0].removeprefix("null, "), 0))])
    return None


def _wait(waits):
    waits = [(kind, left) for name, left in waits for kind in _COUNTERS[name]]

    def wait(machine):
        for kind, left in waits:
            machine.counters.wait(kind, left)

    return wait
