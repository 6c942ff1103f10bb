"""What will be done, before it is done: which layers, in which sizes, how many bytes, how a budget is spent."""
