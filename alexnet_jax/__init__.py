"""AlexNet as it was really built, two towers on two devices, in JAX."""

__version__ = "0.1.0"
