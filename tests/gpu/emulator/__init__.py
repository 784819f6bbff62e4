"""An executor of PTX in NumPy, for GPUs whose products are mma.sync or wgmma: what Triton compiled runs without a GPU.

device      the fake driver's launches, executed on CPU tensors (`executing`)
programs    a launch: the grid, the values of the parameters
parsing     text to instructions
machine     runs lanes of some programs at once between branches; a register is an array over them (`registers`)
opcodes     what each instruction does, a file for a family
tensors     global memory, each tensor far from the others
shared      shared memory: who wrote what since which barrier, and copies that are still on their way
mbarriers   barriers in shared memory, and the boxes of tensors that they wait for (TMA)
warpgroups  products of four warps (wgmma), from their start to their wait
proxies     which ordinary writes asynchronous instructions may see: those that a fence follows
faults      what is raised where a GPU would go on
amd         the same for AMD's assembly: tensors, shared memory and faults are those of here
"""
