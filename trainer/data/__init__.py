"""What training reads: sources of rows, held-out rows, search sets, BM25, hard negatives, token ids, batches."""
