"""What training minimises: contrastive loss, regularizers, the dims controller, teacher scores."""
