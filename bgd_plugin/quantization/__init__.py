"""The one transform: a float network in, a compressed one out, layer after layer."""
