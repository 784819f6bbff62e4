"""The operators `torch.ops.fastattn.*`: what a call is in a graph of torch.compile, torch.export and FakeTensor."""
