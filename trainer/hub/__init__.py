"""The Hugging Face hub: downloads, uploads, this project's files in its cache, and the Python code that a model names."""
