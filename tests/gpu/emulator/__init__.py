"""An executor of PTX for sm_80 in NumPy: kernels that Triton compiled run as the compiled code says, without a GPU.

device      the fake driver's launches, executed on CPU tensors (`executing`)
parsing     text to instructions
machine     runs lanes of some programs at once between branches; a register is an array over them (`registers`)
opcodes     what each instruction does, a file for a family
tensors     global memory, each tensor far from the others
shared      shared memory: who wrote what since which barrier, and copies that are still on their way
faults      what is raised where a GPU would go on
"""
