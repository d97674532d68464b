"""A trained model, and the documents it encodes, as files: for search engines, ONNX and Parquet."""
