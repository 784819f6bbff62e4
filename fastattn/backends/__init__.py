"""The functions of the rows of `fastattn.dispatch.KERNELS`, a file for each backend."""
