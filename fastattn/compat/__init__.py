"""The functions of other packages, under their own names and with their own rules, on fastattn's kernels."""
