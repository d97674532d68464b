"""One run, from config to final model: prepare, describe, train, resume, score."""
