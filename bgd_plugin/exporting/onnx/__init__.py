"""ONNX, for onnxruntime, OpenVINO and browsers: the network's graph, with the tensors as small as in our own file."""
