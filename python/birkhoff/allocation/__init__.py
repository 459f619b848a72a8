"""Chooses the bits of each tensor, for a quality or a size."""

from birkhoff.allocation.target import Target, allocate, check_target

__all__ = ["Target", "allocate", "check_target"]
