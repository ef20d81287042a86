"""An artifact in forms that other programs read: the plain model of its family, ONNX."""
