"""The Mixer platform: prepare, train, index, evaluate and serve on Ray."""

__version__ = "0.1.0"
