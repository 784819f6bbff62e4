"""An executor of AMD's assembly in NumPy, as ..programs is one of PTX: for gfx1100 (RDNA3) and gfx942 (CDNA3).

programs    a launch: the grid, the bytes of the arguments
parsing     text to instructions
machine     runs waves of some programs at once between branches
registers   arrays over the lanes of these waves; EXEC
counters    what is loaded and not waited for (s_waitcnt)
opcodes     what each instruction does, a file for a family
"""
