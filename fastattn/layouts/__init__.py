"""Layouts of q, k, v and of the keys that a query sees, other than dense: a short `bind` each."""
