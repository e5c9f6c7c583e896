"""A trained model in use: features of images in a file, and the model as ONNX."""
