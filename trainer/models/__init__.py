"""The three architectures built from a base model: its code converted, its prompts, its attention, its query weights."""
