"""arsp: accelerate image autoregressive models."""

__version__ = "0.1.0"
