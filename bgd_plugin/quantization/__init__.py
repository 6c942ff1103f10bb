"""The transform: from a float network to a compressed one, layer by layer."""
