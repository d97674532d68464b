"""`make prove`: trains the eight configs and measures them beside baselines, step by step, into docs/results.md."""
