"""Planning: which layers are quantized, in which sizes, how many bytes that takes, and how a budget is spent."""
