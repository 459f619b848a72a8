"""Decodes with torch operations, on any device: bit for bit what the CPU decoder gives.

It is slow, and serves devices for which there is no kernel. ``docs/format.md`` says what it does.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from birkhoff import _core

#: About how many weights are decoded at once; each takes some 30 bytes on the way.
_AT_ONCE = 1 << 22


@torch.no_grad()
def decode(
    codes: Tensor,
    row_scales: Tensor,
    group_exponents: Tensor,
    rows: int,
    cols: int,
    *,
    bits: int,
    codec: str,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The decoded matrix, of shape (rows, cols).

    Args:
        codes: uint8 of shape (strips, blocks, 64 * bits).
        row_scales: bfloat16 of shape (16 * strips,).
        group_exponents: uint8 of shape (strips, groups, 8).
        rows: Rows of the matrix.
        cols: Columns of the matrix.
        bits: Code bits a weight.
        codec: ``"shift"`` or ``"winding"``.
        dtype: The dtype to round to.
    """
    out = torch.empty(rows, cols, dtype=dtype, device=codes.device)
    strips, blocks, groups = -(-rows // 16), -(-cols // 32), -(-cols // 128)
    if out.numel() == 0:
        return out
    codes = codes.reshape(strips, blocks, -1)
    exponents = group_exponents.reshape(strips, groups, 8)
    scales = row_scales.float().reshape(strips, 16, 1)
    of_exponent = _table("group_scales", codes.device)
    step = max(1, _AT_ONCE // (16 * 32 * blocks))
    for first in range(0, strips, step):
        chunk = slice(first, first + step)
        # Rows 0 to 7 have the low halves of the bytes, rows 8 to 15 the high ones.
        places = torch.cat([exponents[chunk] & 15, exponents[chunk] >> 4], dim=2).mT.int()
        group_scale = _look_up(of_exponent, places)
        scale = (scales[chunk] * group_scale).repeat_interleave(128, 2)[..., :cols]
        value = _values(codes[chunk], bits, codec).flatten(2)[..., :cols]
        decoded = (scale * value).flatten(0, 1)
        end = min(rows, 16 * (first + step))
        out[16 * first : end] = decoded[: end - 16 * first]
    return out


def _values(codes: Tensor, bits: int, codec: str) -> Tensor:
    """The values before scaling: float32 of shape (strips, 16, blocks, 32)."""
    strips, blocks, _ = codes.shape
    if bits == 8:
        # (strip, block, pair of columns, row, stream, column of the pair)
        quads = codes.view(torch.int8).reshape(strips, blocks, 8, 16, 2, 2)
        return quads.permute(0, 3, 1, 4, 2, 5).reshape(strips, 16, blocks, 32).float()
    words = codes.contiguous().view(torch.int16).reshape(strips, blocks, bits, 16, 2)
    # (strip, row, stream, word of all blocks)
    words = words.permute(0, 3, 4, 1, 2).reshape(strips, 16, 2, blocks * bits).int() & 0xFFFF
    # Each word below the one before it: a window spans two at most. Before the first is the last.
    pairs = words.roll(1, -1) << 16 | words
    pairs = pairs.reshape(strips, 16, 2, blocks, bits)
    curve = _table("curve", codes.device)
    values = []
    for end, multiplier in _core.taps(codec, bits):
        index = (end - 1) // 16
        window = pairs[..., index] >> (16 * (index + 1) - end) & 0xFFFF
        values.append(_look_up(curve, window * multiplier >> 8 & 0xFF))
    # (strip, row, stream, block, weight)
    return torch.stack(values, -1).transpose(2, 3).reshape(strips, 16, blocks, 32)


def _look_up(table: Tensor, places: Tensor) -> Tensor:
    return table.index_select(0, places.flatten()).reshape(places.shape)


@functools.lru_cache(maxsize=64)
def _table(name: str, device: torch.device) -> Tensor:
    # Made once: a copy to the device has no place in the capture of a CUDA graph.
    values: list[float] = getattr(_core, name)()
    return torch.tensor(values, dtype=torch.float32, device=device)
