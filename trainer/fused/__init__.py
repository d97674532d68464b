"""The SPLADE head without logits."""
