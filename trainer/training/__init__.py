"""One run from config to final model: prepared, trained, resumed, evaluated."""
