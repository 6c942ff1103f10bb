"""Product quantization as pure functions on tensors: blocks, k-means, EM and bit packing."""
