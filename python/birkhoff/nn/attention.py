"""Attention of image encoders through the operator, in models whose code knows nothing of it.

The encoders of Segment Anything (ViTDet with decomposed relative positions; segment_anything,
segment_anything_hq, transformers) hold the score matrix of every head: 64 MB for an image of
64 x 64 tokens, and again for its bias. :func:`fuse_attention` gives such modules a subclass of
their own class whose forward calls :mod:`birkhoff.attention` instead. Parameters, state dict and
attributes stay as they are, and so does what the modules compute, up to the rounding of float32.

Inference on the CPU takes the operator. Whatever else is asked for (gradients, training mode,
another device or dtype, attention weights) takes the forward of the original class.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from birkhoff.attention import attention
from birkhoff.ops import DTYPES

if TYPE_CHECKING:
    from collections.abc import Sequence

Model = TypeVar("Model", bound=nn.Module)

#: What attention may have: with others, such as rotary embeddings, it computes something else.
_ATTENTION_ATTRIBUTES = {
    *("qkv", "proj", "num_heads", "num_attention_heads", "scale", "dropout"),
    *("use_rel_pos", "rel_pos_h", "rel_pos_w"),
}
#: The norms before attention and MLP, by the names that packages give them.
_NORMS = (("norm1", "norm2"), ("layer_norm1", "layer_norm2"))
#: What a block may have.
_BLOCK_ATTRIBUTES = {"attn", "mlp", "window_size", *_NORMS[0], *_NORMS[1]}


def fuse_attention(model: Model) -> Model:
    """Lets the attention modules of image encoders compute by the operator, in place.

    Modules are recognised by their attributes; those of other kinds, and the eager implementation
    of transformers, which is there to return attention weights, stay as they are.

    Returns:
        The model itself.
    """
    for module in model.modules():
        if _is_attention(module):
            module.__class__ = _fused(type(module), FusedAttention)
    for module in model.modules():
        if _is_block(module):
            module.__class__ = _fused(type(module), FusedBlock)
    return model


class _Fused(nn.Module):
    """A module whose class was made here of its original class."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class cannot be imported by its name: it is made again.
        mixin, base = type(self).__bases__
        return _empty, (base, mixin), self.__dict__

    def _takes_operator(self, x: Tensor) -> bool:
        """Whether the operator can do what is asked for."""
        return (
            not self.training
            and x.is_cpu
            and x.ndim == 4
            and x.dtype in DTYPES
            and not (torch.is_grad_enabled() and _requires_grad(self, x))
        )


class FusedAttention(_Fused):
    """Attention of an image encoder: ``(B, H, W, C)`` to the same shape."""

    qkv: nn.Module
    proj: nn.Module
    scale: float
    use_rel_pos: bool
    rel_pos_h: Tensor
    rel_pos_w: Tensor

    def forward(self, hidden_states: Tensor, *args: Any, **options: Any) -> Any:
        """As the original class."""
        asked = any(v is not None and v is not False for v in (*args, *options.values()))
        if asked or not self._takes_operator(hidden_states):
            return super().forward(hidden_states, *args, **options)
        output = self.attend(hidden_states)
        return (output, None) if _returns_weights(self) else output

    def attend(self, x: Tensor, window: int = 0) -> Tensor:
        """Attention of the tokens of an image, within windows of so many rows and columns if not 0.

        Tokens of a window beyond the image are zeros, as if ``x`` was padded with them.
        """
        batch, height, width, _ = x.shape
        qkv: Tensor = self.qkv(x)
        heads: int = getattr(self, "num_heads", 0) or getattr(self, "num_attention_heads", 0)
        head_dim = qkv.shape[-1] // (3 * heads)
        q, k, v = qkv.reshape(batch, height, width, 3, heads, head_dim).unbind(3)
        tables: Sequence[Tensor | None] = (None, None)
        if self.use_rel_pos:
            tables = (
                _resized(self.rel_pos_h, window or height),
                _resized(self.rel_pos_w, window or width),
            )
        padding: Sequence[Tensor | None] = (None, None)
        bias = self.qkv.bias
        if window and isinstance(bias, Tensor):
            # What a token of zeros would be, in the dtype that it would have.
            _, *padding = bias.to(qkv.dtype).view(3, heads, head_dim).unbind()
        output = attention(q, k, v, float(self.scale), *tables, window, *padding)
        return self.proj(output.view(batch, height, width, heads * head_dim))  # type: ignore[no-any-return]


class FusedBlock(_Fused):
    """A block of an image encoder that attends within windows, without cutting the image."""

    attn: nn.Module
    mlp: nn.Module
    window_size: int

    def forward(self, hidden_states: Tensor, *args: Any, **options: Any) -> Any:
        """As the original class."""
        attn = self.attn
        if (
            args
            or options
            or not self.window_size
            or not isinstance(attn, FusedAttention)
            or _is_hooked(attn)
            or not self._takes_operator(hidden_states)
        ):
            return super().forward(hidden_states, *args, **options)
        norm1, norm2 = _norms(self)
        x = hidden_states + attn.attend(norm1(hidden_states), self.window_size)
        return x + self.mlp(norm2(x))


def _is_attention(module: nn.Module) -> bool:
    """Whether a module is attention of an image encoder as :class:`FusedAttention` computes it."""
    qkv, proj = getattr(module, "qkv", None), getattr(module, "proj", None)
    use_rel_pos = getattr(module, "use_rel_pos", None)
    return (
        not isinstance(module, FusedAttention)
        and isinstance(qkv, nn.Module)
        and isinstance(proj, nn.Module)
        and _attributes(module) <= _ATTENTION_ATTRIBUTES
        and hasattr(module, "scale")
        and (hasattr(module, "num_heads") or hasattr(module, "num_attention_heads"))
        and isinstance(use_rel_pos, bool)
        and (not use_rel_pos or (hasattr(module, "rel_pos_h") and hasattr(module, "rel_pos_w")))
        and not (_returns_weights(module) and "Sdpa" not in type(module).__name__)
    )


def _returns_weights(attention_module: nn.Module) -> bool:
    """Whether a module returns a pair of outputs and weights, as those of transformers do."""
    return hasattr(attention_module, "num_attention_heads")


def _is_block(module: nn.Module) -> bool:
    """Whether a module is a block as :class:`FusedBlock` computes it."""
    return (
        not isinstance(module, FusedBlock)
        and isinstance(getattr(module, "attn", None), FusedAttention)
        and isinstance(getattr(module, "mlp", None), nn.Module)
        and isinstance(getattr(module, "window_size", None), int)
        and len(_norms(module)) == 2
        and _attributes(module) <= _BLOCK_ATTRIBUTES
    )


def _attributes(module: nn.Module) -> set[str]:
    """The names of what a module has beside what torch gives to each."""
    own = {name for name in vars(module) if not name.startswith("_")}
    named = {*module._modules, *module._parameters, *module._buffers}
    return own - {"training"} | named


def _norms(block: nn.Module) -> list[nn.Module]:
    """The norms before attention and MLP."""
    modules = block._modules
    return [norm for pair in _NORMS for name in pair if (norm := modules.get(name)) is not None]


def _is_hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _requires_grad(module: nn.Module, x: Tensor) -> bool:
    return x.requires_grad or any(parameter.requires_grad for parameter in module.parameters())


def _resized(table: Tensor, size: int) -> Tensor:
    """A table of relative positions for another number of tokens than it was trained with."""
    rows = 2 * size - 1
    if table.shape[0] == rows:
        return table
    columns = table.float().t().unsqueeze(0)
    return nn.functional.interpolate(columns, size=rows, mode="linear").squeeze(0).t()


#: The fused classes by the original class.
_FUSED_CLASSES: dict[type, type[nn.Module]] = {}


def _fused(base: type[nn.Module], mixin: type[_Fused]) -> type[nn.Module]:
    """The subclass of an original class that computes as ``mixin`` does."""
    if base not in _FUSED_CLASSES:
        _FUSED_CLASSES[base] = type(f"Fused{base.__name__}", (mixin, base), {})
    return _FUSED_CLASSES[base]


def _empty(base: type[nn.Module], mixin: type[_Fused]) -> nn.Module:
    """A module of a fused class that is still to get its state."""
    fused = _fused(base, mixin)
    return fused.__new__(fused)
