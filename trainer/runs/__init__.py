"""The folder of a run: its manifest, its lock, its checkpoints, its results, and which queries chose its checkpoint."""
