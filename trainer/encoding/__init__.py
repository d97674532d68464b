"""Vectors without logits: the fused SPLADE head, encoding into sparse rows, and a check with the library alone."""
