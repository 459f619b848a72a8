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
    """Spares memory for what is to be filled: layers make their parameters with ``torch.empty``."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)
