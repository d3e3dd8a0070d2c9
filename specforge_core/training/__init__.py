"""From hidden states to a draft checkpoint."""
