"""How fast and how lean training and encoding are, against stock sentence-transformers in the same run."""
