"""Attention under torch.func and forward-mode differentiation, and derivatives of its gradients, in O(n) memory.

`works` holds what is computed and how each of it is differentiated, `folding` how vmap becomes batch, `blocks` the loop
over blocks of query rows in which all second and higher derivatives run, `dense` and `edges` the formulas of a block.
"""
