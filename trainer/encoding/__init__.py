"""Texts to sparse vectors: the fused SPLADE head, sparse rows, exact search, and a check with the library alone."""
