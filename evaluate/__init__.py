"""Measures models and baselines on search tasks. Meets training in the run folder alone."""
