"""The machine: its device and memory, processes that work together, files that appear whole, progress on the terminal."""
