"""EM Policy Gradient for small language models on one GPU."""

__version__ = "0.1.0"
