"""Torch modules that work on coded weights."""

from birkhoff.nn.linear import HyperLinear

__all__ = ["HyperLinear"]
