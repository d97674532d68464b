"""The three architectures, built from a base model or from scratch: converted code, prompts, attention, query weights."""
