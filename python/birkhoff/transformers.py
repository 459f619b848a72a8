"""Compressed models in Hugging Face transformers.

Importing this module registers :class:`BirkhoffConfig`. From then on ``from_pretrained`` loads
folders with compressed weights, with ``quantization_config=BirkhoffConfig(bits=4)`` it compresses
what it loads, and ``save_pretrained`` writes compressed weights.

>>> from birkhoff.transformers import BirkhoffConfig
>>> from transformers import SamModel  # doctest: +SKIP
>>> model = SamModel.from_pretrained(
...     "facebook/sam-vit-base", quantization_config=BirkhoffConfig(bits=4)
... )  # doctest: +SKIP
>>> model.save_pretrained("sam-vit-base-4bit")  # doctest: +SKIP
>>> model = SamModel.from_pretrained("sam-vit-base-4bit")  # doctest: +SKIP
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from birkhoff.compression import check_rules
from birkhoff.models import SETTINGS, compress
from birkhoff.nn.coded import PARTS, CodedParameter
from birkhoff.nn.placement import place
from birkhoff.plan import best_matrix_view
from birkhoff.precision import Precision, checked

if TYPE_CHECKING:
    from transformers import PreTrainedModel

METHOD = "birkhoff"

logger = logging.get_logger(__name__)


@register_quantization_config(METHOD)
class BirkhoffConfig(QuantizationConfigMixin):
    """How a model is compressed; as ``quantization_config`` it is a part of ``config.json``.

    Args:
        bits: Code bits a weight of the bulk of the model.
        codec: ``"shift"`` or ``"winding"``.
        rules: Pairs of a name pattern and the bits of the tensors that match, 16 for not coded.
        skip: Name patterns of tensors to keep exactly as they are.
        precision: That of the coded layers; None for what :func:`birkhoff.set_precision` has set.

    Raises:
        ValueError: The codec lacks a rate, or there is no such codec or precision.
    """

    def __init__(
        self,
        bits: int = 4,
        codec: str = "shift",
        rules: Mapping[str, int] | Sequence[tuple[str, int]] = (),
        skip: Sequence[str] = (),
        precision: Precision | None = None,
        **_others: Any,
    ) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]  # not in their enumeration
        self.bits = bits
        self.codec = codec
        self.rules = check_rules(rules, bits, codec)
        self.skip = list(skip)
        self.precision = None if precision is None else checked(precision)


@register_quantizer(METHOD)
class BirkhoffQuantizer(HfQuantizer):
    """Puts coded parameters into the models of ``from_pretrained``."""

    quantization_config: BirkhoffConfig

    def __init__(self, quantization_config: BirkhoffConfig, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        self._parameters: dict[str, CodedParameter] = {}

    def validate_environment(self, *args: Any, device_map: Any = None, **options: Any) -> None:
        """Refuses what cannot work.

        Raises:
            ValueError: Weights are to be put on another device than the CPU.
        """
        devices = device_map.values() if isinstance(device_map, dict) else [device_map]
        for device in devices:
            if device is not None and str(device) not in ("auto", "cpu"):
                raise ValueError(
                    f"birkhoff loads compressed models on the CPU, not on {device}; leave out "
                    f"device_map, and move the model when it is loaded: model.to({str(device)!r})"
                )

    def update_device_map(self, device_map: Any) -> Any:
        """All on the CPU."""
        return {"": "cpu"} if device_map is not None else None

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **options: Any
    ) -> None:
        """Reads the coded tensors of the checkpoint, and hides their places from transformers.

        Transformers would look for modules by the names of the coded parts, and fill the places
        with random weights.
        """
        files = [file for file in checkpoint_files or [] if file.endswith(".safetensors")]
        self._parameters = _read_coded(model, files, self.quantization_config.codec)
        self.pre_quantized = self.pre_quantized or bool(self._parameters)
        for name in self._parameters:
            path, _, attribute = name.rpartition(".")
            module = model.get_submodule(path)
            holder: dict[str, Any] = module._parameters
            holder = holder if attribute in holder else module._buffers
            holder[attribute] = None
            # Spares it the initialisation, which would miss the weight.
            module._is_hf_initialized = True  # type: ignore[assignment]
        patterns = [rf"\.{part}$" for part in PARTS]
        known = model._keys_to_ignore_on_load_unexpected or []
        model._keys_to_ignore_on_load_unexpected = {*known, *patterns}

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **options: Any
    ) -> PreTrainedModel:
        config = self.quantization_config
        if self.pre_quantized:
            place(model, self._parameters, config.precision)
            self._parameters = {}
            setattr(model, SETTINGS, {"bits": config.bits, "codec": config.codec})
        else:
            compress(model, config.bits, config.codec, config.rules, config.skip, config.precision)
        return model

    def is_serializable(self) -> bool:
        """Whether ``save_pretrained`` can write the model."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether the model can be trained."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Whether ``torch.compile`` takes the model."""
        return True


def _read_coded(
    model: PreTrainedModel, files: Sequence[str], codec: str
) -> dict[str, CodedParameter]:
    """The coded tensors of a checkpoint, in the memory maps of its files, by their model's names.

    Raises:
        ValueError: A coded tensor has no place in the model, or does not fit there.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    prefix: str | None = model.base_model_prefix
    targets = model.state_dict()
    parameters: dict[str, CodedParameter] = {}
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (it is no mapping)
                name, _, part = key.rpartition(".")
                if part in PARTS:
                    parts.setdefault(name, {})[part] = tensors.get_tensor(key)
    unexpected: list[str] = []
    for source, found in parts.items():
        name, _ = rename_source_key(source, renamings, converters, prefix, targets)
        if name not in targets:
            unexpected.append(name)
            continue
        target = targets[name]
        bits = found["codes"].shape[-1] // 64 if "codes" in found else 4
        _, rows, cols = best_matrix_view(target.shape, bits, codec)
        shapes = CodedParameter.empty((rows, cols), bits=bits, codec=codec, device="meta").parts()
        for part, expected in zip(PARTS, shapes, strict=True):
            tensor = found.get(part)
            if tensor is None or (tensor.shape, tensor.dtype) != (expected.shape, expected.dtype):
                what = "missing" if tensor is None else f"{tuple(tensor.shape)} {tensor.dtype}"
                raise ValueError(
                    f"{source}.{part} is {what} in the checkpoint, where a weight of shape "
                    f"{tuple(target.shape)} needs {tuple(expected.shape)} {expected.dtype}; "
                    "it is of another model"
                )
        parameters[name] = CodedParameter(
            found["codes"],
            found["row_scales"],
            found["group_exponents"],
            (rows, cols),
            bits=bits,
            codec=codec,
            shape=target.shape,
            dtype=target.dtype,
        )
    # Some classes of a model have fewer modules than its checkpoint, and say so.
    known = model._keys_to_ignore_on_load_unexpected or []
    unexpected = [name for name in unexpected if not any(re.search(key, name) for key in known)]
    if unexpected:
        logger.warning(
            "Coded weights of the checkpoint that %s does not have were left out: %s",
            type(model).__name__,
            ", ".join(unexpected),
        )
    return parameters
