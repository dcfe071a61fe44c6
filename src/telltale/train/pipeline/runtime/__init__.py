"""What one rank does: stages and weight versions, messages, gradients across ranks, failures."""
