"""The operator ``torch.ops.birkhoff.attention``: softmax attention without a score matrix.

``attention(q, k, v, scale, rel_pos_h, rel_pos_w, window, padding_k, padding_v)`` gives
``softmax(scale * q @ k.T + bias) @ v`` for each head, contiguous of the shape of ``q``. ``q``,
``k`` and ``v`` are of shape ``(batch, height, width, heads, head_dim)`` in float32, float16 or
bfloat16, with any strides; it computes in float32. A sequence is a grid of height 1.

The bias, if there are tables, is the decomposed relative position of MViTv2:
``q . rel_pos_h[y - y' + H - 1] + q . rel_pos_w[x - x' + W - 1]`` for a query at ``(y, x)`` and a
key at ``(y', x')``, with tables of shape ``(2 * H - 1, head_dim)`` and ``(2 * W - 1, head_dim)``.

With a ``window`` other than 0, tokens attend within windows of so many rows and columns, which H
and W then are. Tokens of a window beyond the grid have the key ``padding_k`` and the value
``padding_v``, of shape ``(heads, head_dim)``, or zeros.

It is for inference: it has no gradient, and says so where one is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from birkhoff import _core
from birkhoff.ops import DTYPES, num_threads

if TYPE_CHECKING:
    from collections.abc import Callable

_SCHEMA = (
    "attention(Tensor q, Tensor k, Tensor v, float scale, Tensor? rel_pos_h=None, "
    "Tensor? rel_pos_w=None, int window=0, Tensor? padding_k=None, Tensor? padding_v=None) "
    "-> Tensor"
)

_library = torch.library.Library("birkhoff", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(_SCHEMA)  # type: ignore[no-untyped-call]


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_pos_h: Tensor | None,
    rel_pos_w: Tensor | None,
    window: int,
    padding_k: Tensor | None,
    padding_v: Tensor | None,
) -> None:
    """Refuses what the operator cannot take, on any device."""
    if q.dtype not in DTYPES:
        raise TypeError(
            f"attention takes float32, float16 or bfloat16, not {q.dtype}; convert q, k and v first"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(
            f"q, k and v must have the same dtype, not {q.dtype}, {k.dtype} and {v.dtype}"
        )
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.ndim != 5:
            raise ValueError(
                f"{name} of shape {tuple(tensor.shape)} must be of shape (batch, height, width, "
                "heads, head_dim)"
            )
    if k.shape != v.shape:
        raise ValueError(
            f"k of shape {tuple(k.shape)} and v of shape {tuple(v.shape)} must have the same shape"
        )
    if (q.shape[0], *q.shape[3:]) != (k.shape[0], *k.shape[3:]):
        raise ValueError(
            f"q of shape {tuple(q.shape)} and k of shape {tuple(k.shape)} must have the same "
            "batch, heads and head_dim"
        )
    if (rel_pos_h is None) != (rel_pos_w is None):
        raise ValueError("rel_pos_h and rel_pos_w belong together; give both or none")
    if window < 0:
        raise ValueError(f"window must be 0 for none, or rows and columns, not {window}")
    if not window and (padding_k is not None or padding_v is not None):
        raise ValueError("padding_k and padding_v are for windows; leave them out or set window")
    if (window or rel_pos_h is not None) and q.shape != k.shape:
        raise ValueError(
            "windows and relative positions need q and k of the same shape, not "
            f"{tuple(q.shape)} and {tuple(k.shape)}"
        )
    _, height, width, heads, head_dim = q.shape
    extras = {
        "rel_pos_h": (rel_pos_h, (2 * (window or height) - 1, head_dim)),
        "rel_pos_w": (rel_pos_w, (2 * (window or width) - 1, head_dim)),
        "padding_k": (padding_k, (heads, head_dim)),
        "padding_v": (padding_v, (heads, head_dim)),
    }
    for name, (extra, shape) in extras.items():
        if extra is not None and tuple(extra.shape) != shape:
            raise ValueError(
                f"{name} of shape {tuple(extra.shape)} does not fit q of shape {tuple(q.shape)} "
                f"with window {window}: it must be of shape {shape}"
            )
    tensors = (q, k, v, rel_pos_h, rel_pos_w, padding_k, padding_v)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise RuntimeError(
            "attention is an inference operator and has no gradient; call it under "
            "torch.inference_mode() or torch.no_grad()"
        )


def _attention_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    rel_pos_h: Tensor | None = None,
    rel_pos_w: Tensor | None = None,
    window: int = 0,
    padding_k: Tensor | None = None,
    padding_v: Tensor | None = None,
) -> Tensor:
    _check(q, k, v, rel_pos_h, rel_pos_w, window, padding_k, padding_v)
    extras = (rel_pos_h, rel_pos_w, padding_k, padding_v)
    for tensor in (q, k, v, *extras):
        if tensor is not None and not tensor.is_cpu:
            raise ValueError(f"attention runs on the CPU; a tensor is on {tensor.device}")
    if q.numel() and not k.numel():
        raise ValueError(f"k of shape {tuple(k.shape)} holds no keys")
    out = torch.empty(q.shape, dtype=q.dtype)
    q, k, v = (_with_contiguous_channels(tensor) for tensor in (q, k, v))
    table_h, table_w, padding_k, padding_v = (
        None if extra is None else extra.float().contiguous() for extra in extras
    )
    windowed = None
    if window:
        zeros = None
        if padding_k is None or padding_v is None:
            zeros = torch.zeros(q.shape[3:])
        padding_k = zeros if padding_k is None else padding_k
        padding_v = zeros if padding_v is None else padding_v
        assert padding_k is not None
        assert padding_v is not None
        windowed = (window, (_address(padding_k), _address(padding_v)))
    tables = None
    if table_h is not None and table_w is not None:
        tables = (_address(table_h), _address(table_w))
    _core.attention(
        (q.data_ptr(), q.shape, q.stride()[:4]),
        (k.data_ptr(), k.shape, k.stride()[:4]),
        (v.data_ptr(), v.shape, v.stride()[:4]),
        DTYPES[q.dtype],
        out.data_ptr(),
        scale,
        tables,
        windowed,
        num_threads(),
    )
    return out


def _with_contiguous_channels(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(4) == 1 or tensor.shape[4] <= 1 else tensor.contiguous()


def _address(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.numel()


def _attention_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    rel_pos_h: Tensor | None = None,
    rel_pos_w: Tensor | None = None,
    window: int = 0,
    padding_k: Tensor | None = None,
    padding_v: Tensor | None = None,
) -> Tensor:
    _check(q, k, v, rel_pos_h, rel_pos_w, window, padding_k, padding_v)
    return q.new_empty(q.shape)


_library.impl("attention", _attention_cpu, "CPU")  # type: ignore[no-untyped-call]
torch.library.register_fake("birkhoff::attention", _attention_fake, lib=_library)

attention = cast("Callable[..., Tensor]", torch.ops.birkhoff.attention)
