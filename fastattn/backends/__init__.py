"""The functions of the rows of `fastattn.kernel_table.KERNELS`, a file for each backend."""
