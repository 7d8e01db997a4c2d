"""From a fused Program to something that runs: the eager oracle, Inductor, ONNX."""
