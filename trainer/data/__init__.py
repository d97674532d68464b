"""Rows, search sets and token ids: sources, held-out rows, hard negatives, batches."""
