"""A trained model on the hub: its card, the check in a fresh process, the upload."""
