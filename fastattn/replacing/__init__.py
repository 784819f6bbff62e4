"""Attention of existing models on fastattn's kernels: put in, counted, compared and taken out again."""
