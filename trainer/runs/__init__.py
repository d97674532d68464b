"""The run folder: manifest, lock, checkpoints, stored scores, and the queries that chose the checkpoint."""
