"""The detector as a file that runs without casc: torch.export, ONNX, AOTInductor."""
