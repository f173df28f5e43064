"""The Mixer method (arXiv 2305.03972) in PyTorch, transformers and Arrow. Nothing here imports Ray."""
