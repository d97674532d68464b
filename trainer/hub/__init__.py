"""The Hugging Face hub: downloads, uploads, what is kept in its cache, and which code of its own a model names."""
