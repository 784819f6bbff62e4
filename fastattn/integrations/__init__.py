"""fastattn inside other libraries, one module a library; each imports its library, `import fastattn` imports none."""
