"""A trained model goes to the hub: the model card, the check in a fresh process, the upload."""
