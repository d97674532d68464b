"""The machine: device and memory, processes that work together, files that appear complete, progress on the terminal."""
