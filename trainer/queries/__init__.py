"""Queries for a corpus that has none: a language model writes them, and each is checked before it is kept."""
