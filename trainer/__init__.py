"""nordsparse's trainer: one YAML file to a trained, reloadable sparse text encoder."""
