"""Puts coded parameters where a model has tensors."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from birkhoff.nn.attention import fuse_attention
from birkhoff.nn.coded import PARTS, CodedLayer, CodedParameter
from birkhoff.nn.conv import HyperConv2d
from birkhoff.nn.linear import HyperLinear

if TYPE_CHECKING:
    from collections.abc import Mapping

    from birkhoff.precision import Precision

#: What the operator computes in.
_COMPUTE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

#: The attribute of a module that holds the coded form of its decoded tensors, by their names.
_CODED_FORMS = "_coded_forms"


def place(
    model: nn.Module, parameters: Mapping[str, CodedParameter], precision: Precision | None
) -> None:
    """Replaces tensors of a model by coded ones, in place.

    The weight of an ``nn.Linear`` or of a convolution that :class:`HyperConv2d` can do is
    multiplied with as it is: the layer is swapped, wherever it is used. Any other module keeps its
    class and gets the decoded tensor; in its state dict, the coded form stands for it. No parameter
    takes a gradient any more, and attention of image encoders is computed by the operator.

    Args:
        model: The model.
        parameters: Coded parameters by the names that their tensors have in the state dict; tied
            tensors have one in common.
        precision: That of the swapped layers.

    Raises:
        ValueError: The model itself is a layer to be swapped.
    """
    parents: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    for parent in model.modules():
        for name, child in parent._modules.items():
            parents[id(child)].append((parent, name))
    decoded: dict[CodedParameter, Tensor] = {}
    for name, parameter in parameters.items():
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        if isinstance(module, CodedLayer) or attribute in coded_forms(module):
            continue  # Reached before, by another name.
        layer = _layer(module, attribute, parameter, precision)
        if layer is None:
            if parameter not in decoded:
                decoded[parameter] = parameter.decode()
            _hold_decoded(module, attribute, parameter, decoded)
            continue
        if module is model:
            raise ValueError(
                f"the model is itself a layer, which cannot be replaced in place: {module}; "
                f"use birkhoff.nn.{type(layer).__name__}"
            )
        for parent, child_name in parents[id(module)]:
            parent._modules[child_name] = layer.train(module.training)
    # Gradients could not pass the coded layers: without any, the model also runs outside of
    # torch.no_grad().
    model.requires_grad_(False)
    fuse_attention(model)


def coded_forms(module: nn.Module) -> dict[str, CodedParameter]:
    """The coded forms of the tensors that a module has decoded, by their names."""
    forms: dict[str, CodedParameter] = module.__dict__.get(_CODED_FORMS, {})
    return forms


def coded_parameters(model: nn.Module) -> dict[str, CodedParameter]:
    """The coded parameters of a model by the names of their tensors, each under all its names."""
    found: dict[str, CodedParameter] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        if isinstance(module, CodedLayer):
            found[f"{prefix}weight"] = module.coded_weight
        found |= {prefix + name: form for name, form in coded_forms(module).items()}
    return found


def _layer(
    module: nn.Module, attribute: str, weight: CodedParameter, precision: Precision | None
) -> CodedLayer | None:
    """The layer that multiplies with the coded weight in the place of a module, if there is one.

    Subclasses do something else with their weight, and hooks would be lost.
    """
    hooked = module._forward_hooks or module._forward_pre_hooks
    if attribute != "weight" or hooked or weight.dtype not in _COMPUTE_DTYPES:
        return None
    if weight.matrix_shape[0] != weight.shape[0]:
        return None
    if type(module) is nn.Linear:
        return HyperLinear(weight, module.bias, precision)
    if type(module) is nn.Conv2d and HyperConv2d.fits(module):
        stride = (module.stride[0], module.stride[1])
        return HyperConv2d(weight, module.bias, stride, precision)
    return None


def _hold_decoded(
    module: nn.Module,
    name: str,
    parameter: CodedParameter,
    decoded: dict[CodedParameter, Tensor],
) -> None:
    if name in module._parameters:
        if not isinstance(decoded[parameter], nn.Parameter):
            decoded[parameter] = nn.Parameter(decoded[parameter], requires_grad=False)
        module._parameters[name] = decoded[parameter]  # type: ignore[assignment]
    else:
        module._buffers[name] = decoded[parameter]
    if not coded_forms(module):
        setattr(module, _CODED_FORMS, {})
        module._register_state_dict_hook(_save_coded_forms)  # type: ignore[no-untyped-call]
        module._register_load_state_dict_pre_hook(  # type: ignore[no-untyped-call]
            _load_coded_forms, with_module=True
        )
    coded_forms(module)[name] = parameter


def _save_coded_forms(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, _metadata: Any
) -> None:
    """Puts coded forms into a state dict in the place of decoded tensors."""
    for name, parameter in coded_forms(module).items():
        del state_dict[prefix + name]
        for part, tensor in zip(PARTS, parameter.parts(), strict=True):
            state_dict[f"{prefix}{name}.{part}"] = tensor.detach()


def _load_coded_forms(
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    _metadata: Any,
    _strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    errors: list[str],
) -> None:
    """Takes coded forms out of a state dict and puts decoded tensors into their place."""
    for name, parameter in coded_forms(module).items():
        key = prefix + name
        if key in state_dict:
            unexpected_keys.append(key)
        for part, tensor in zip(PARTS, parameter.parts(), strict=True):
            loaded = state_dict.pop(f"{key}.{part}", None)
            if loaded is None:
                missing_keys.append(f"{key}.{part}")
            elif loaded.shape != tensor.shape:
                errors.append(
                    f"size mismatch for {key}.{part}: copying a param with shape {loaded.shape} "
                    f"from checkpoint, the shape in current model is {tensor.shape}."
                )
            else:
                tensor.copy_(loaded)
        state_dict[key] = parameter.decode()
