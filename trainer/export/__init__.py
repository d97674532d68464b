"""A trained model, and the documents it encodes, for search engines, ONNX and columns."""
