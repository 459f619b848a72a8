"""Torch modules that work on coded weights."""

from birkhoff.nn.attention import fuse_attention
from birkhoff.nn.coded import CodedParameter
from birkhoff.nn.conv import HyperConv2d
from birkhoff.nn.linear import HyperLinear

__all__ = ["CodedParameter", "HyperConv2d", "HyperLinear", "fuse_attention"]
