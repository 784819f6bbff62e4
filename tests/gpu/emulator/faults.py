"""What a GPU does not notice, or notices too late. The machine adds the instruction and its line."""


class Fault(BaseException):
    """A mistake in compiled code, or code that the emulator does not know. No Exception: those of a launch are a
    driver's, for which fastattn refuses the kernel."""


class Unknown(Fault):
    """An instruction, or a variant of it, that is not emulated."""


class Uninitialized(Fault):
    """A register or a place of shared memory is read that nobody wrote."""


class OutOfBounds(Fault):
    """An access outside every tensor, in a gap between its strides, or outside shared memory."""


class Misaligned(Fault):
    """An address that is no multiple of the size of the access."""


class NotWaited(Fault):
    """Shared memory or a register is touched while an asynchronous copy or product that needs it is under way."""


class Unfenced(Fault):
    """An asynchronous instruction takes what others wrote, with no fence between."""


class Misused(Fault):
    """An mbarrier is made where there is one, or arrived at more often than it counts."""


class Race(Fault):
    """Two warps (or programs), one of them writing, that no barrier orders."""


class Deadlock(Fault):
    """A wait for what nobody will do."""


class Diverged(Fault):
    """Some lanes of a warp, or warps of a program, do not take part in what all have to."""
