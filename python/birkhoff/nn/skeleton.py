"""Builds a model without its parameters."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


#: Give a tensor its first values. On the meta device they do nothing, but import a compiler first.
_FILLS = frozenset(
    [
        torch.Tensor.fill_,
        torch.Tensor.normal_,
        torch.Tensor.uniform_,
        torch.Tensor.zero_,
        nn.init.constant_,
        nn.init.kaiming_uniform_,
        nn.init.normal_,
        nn.init.uniform_,
    ]
)


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules made here have their parameters on the meta device, and real buffers.

    With ``torch.device("meta")`` buffers that are not in the state dict, and tensors that are plain
    attributes, would be lost, and code that looks at a value would fail.
    """
    on_meta = WeakTensorKeyDictionary()

    def to_meta(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> Any:
        if parameter is None or parameter.is_meta:
            return None
        if parameter not in on_meta:  # One that is registered twice stays one.
            on_meta[parameter] = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        return on_meta[parameter]

    handle = register_module_parameter_registration_hook(to_meta)
    try:
        with _EmptyOnMeta():
            yield
    finally:
        handle.remove()


class _EmptyOnMeta(TorchFunctionMode):
    """Spares memory for what is to be filled: layers make their parameters with ``torch.empty``.

    What is on the meta device stays there.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _FILLS:
            tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta:
                return tensor
        if func is torch.empty and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": "meta"}
        elif func in (torch.Tensor.to, torch.Tensor.cpu) and args[0].is_meta:
            # Builders move what they have built; there is nothing to move yet.
            _, dtype, *_ = torch._C._nn._parse_to(*args[1:], **kwargs)
            return args[0] if dtype is None else func(args[0], dtype)
        return func(*args, **kwargs)
