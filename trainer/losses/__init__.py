"""What training minimises: contrastive loss, regularizers, the control of active dims, teacher scores."""
