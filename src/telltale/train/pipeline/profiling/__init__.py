"""What a model and its machines are: seconds and bytes of every layer, levels and bandwidths of the links."""
