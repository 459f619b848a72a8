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

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    ConversionOps,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from birkhoff import _core
from birkhoff.checkpoint import Tensor
from birkhoff.compression import check_rules, decide
from birkhoff.dtypes import TORCH_DTYPES
from birkhoff.models import SETTINGS, encode, file_contents, part_bytes, round_stored
from birkhoff.nn.coded import PARTS, CodedParameter
from birkhoff.nn.placement import place
from birkhoff.plan import Coded, Item, Tied, best_matrix_view
from birkhoff.precision import Precision, checked
from birkhoff.torch_checkpoint import tensors_of

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
        #: The tensors of a model that is not loaded yet.
        self._tensors: list[Tensor] = []
        #: Which of them are encoded as soon as they are loaded, by name.
        self._to_encode: dict[str, Coded] = {}
        #: Why one of them could not be encoded.
        self._error: ValueError | None = None

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
        """Prepares the places of what is coded in the checkpoint, or is to be encoded."""
        files = [file for file in checkpoint_files or [] if file.endswith(".safetensors")]
        config = self.quantization_config
        self._parameters = _read_coded(model, files, config.codec)
        self.pre_quantized = self.pre_quantized or bool(self._parameters)
        if not self.pre_quantized:
            self._tensors = _without_values(model)
            plan, _ = self._decide(self._tensors)
            # What is tied is encoded once it is.
            tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
            coded = [item for item in plan if isinstance(item, Coded)]
            self._to_encode = {
                item.tensor.name: item for item in coded if item.tensor.name not in tied
            }
            return
        for name in self._parameters:
            _vacate(model, name)
        # Transformers would look for modules by the names of the coded parts.
        patterns = [rf"\.{part}$" for part in PARTS]
        known = model._keys_to_ignore_on_load_unexpected or []
        model._keys_to_ignore_on_load_unexpected = {*known, *patterns}

    def param_needs_quantization(
        self, model: PreTrainedModel, param_name: str, **options: Any
    ) -> bool:
        """Whether a tensor is encoded as soon as it is loaded."""
        return param_name in self._to_encode

    def get_quantize_ops(self) -> ConversionOps:
        """What encodes it."""
        return _Encode(self)

    def encode(self, model: PreTrainedModel, name: str, tensor: torch.Tensor) -> bool:
        """Encodes a tensor of the checkpoint, if it is to be and fits the model's."""
        item = self._to_encode.pop(name, None)
        if item is None or tuple(tensor.shape) != item.tensor.shape:
            return False
        [loaded] = tensors_of({name: tensor}, type(model).__name__)
        item = replace(item, tensor=loaded)
        try:
            self._parameters[name] = encode(item, self.quantization_config.codec, tensor.dtype)
        except ValueError as error:
            # Raised here, it would become a part of a long report.
            self._error = self._error or error
        _vacate(model, name)
        return True

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **options: Any
    ) -> PreTrainedModel:
        if self._error is not None:
            raise self._error
        config = self.quantization_config
        settings: dict[str, Any] = {"bits": config.bits, "codec": config.codec}
        plan: list[Item] = []
        if not self.pre_quantized:
            state_dict = model.state_dict()
            loaded = {tensor.name: tensor for tensor in tensors_of(state_dict, str(type(model)))}
            plan, settings = self._decide(
                [loaded.get(tensor.name, tensor) for tensor in self._tensors]
            )
            for item in plan:
                name = item.tensor.name
                # What is tied, and what the checkpoint lacks.
                if isinstance(item, Coded) and name in loaded:
                    dtype = state_dict[name].dtype
                    self._parameters[name] = encode(item, config.codec, dtype)
                elif isinstance(item, Tied) and item.to in self._parameters:
                    self._parameters[name] = self._parameters[item.to]
        place(model, self._parameters, config.precision)
        round_stored(model, plan)
        self._parameters, self._tensors, self._to_encode = {}, [], {}
        setattr(model, SETTINGS, settings)
        # Modules that keep something computed from their tensors compute it again.
        model.train(model.training)
        return model

    def _decide(self, tensors: list[Tensor]) -> tuple[list[Item], dict[str, Any]]:
        config = self.quantization_config
        return decide(
            tensors,
            bits=config.bits,
            codec=config.codec,
            user_rules=config.rules,
            skip=config.skip,
        )

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """What ``save_pretrained`` writes: with its metadata, a file as :func:`birkhoff.save`'s."""
        # As transformers does, it leaves out tied tensors, and finds them again when it loads.
        ignored = model._keys_to_ignore_on_save or ()
        contents = [
            (entry, content)
            for entry, content in file_contents(model)
            if content is not None and entry[1] not in ignored
        ]
        names = _names_in_file(model, [name for (_, name, *_), _ in contents])
        original = model.state_dict()
        state_dict: dict[str, torch.Tensor] = {}
        plan, data = [], []
        for (kind, name, *what), content in contents:
            if isinstance(content, CodedParameter):
                parts = zip(PARTS, content.parts(), strict=True)
                held = {f"{name}.{part}": tensor for part, tensor in parts}
            else:
                tensor = original[name]
                held = {name: tensor.half() if content.dtype == "F16" else tensor}
            state_dict |= held
            plan.append((kind, names.get(name), *what))
            data.append([part_bytes(tensor) for tensor in held.values()])
        if not names:
            return state_dict, {}
        settings = json.dumps(getattr(model, SETTINGS, {}))
        return state_dict, {"birkhoff": _core.manifest(plan, data, settings=settings)}

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


class _Encode(ConversionOps):
    """Encodes tensors as transformers loads them, so that few are uncompressed at once."""

    def __init__(self, quantizer: BirkhoffQuantizer) -> None:
        self.quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], *patterns: Any, **options: Any) -> dict[str, Any]:
        """Takes out what was encoded."""
        model, missing_keys = options["model"], options["missing_keys"]
        left = {}
        for name, value in input_dict.items():
            tensor = value[0] if isinstance(value, list) else value
            if self.quantizer.encode(model, name, tensor):
                missing_keys.discard(name)
            else:
                left[name] = value
        return left


def _without_values(model: PreTrainedModel) -> list[Tensor]:
    """The tensors of a model on the meta device, as zeros."""
    tensors = []
    for name, tensor in model.state_dict().items():
        dtype = TORCH_DTYPES[str(tensor.dtype)]
        tensors.append(Tensor(name, dtype, tuple(tensor.shape), partial(_zeros, tensor.nbytes)))
    return tensors


def _zeros(nbytes: int) -> NDArray[np.uint8]:
    return np.zeros(nbytes, np.uint8)


def _vacate(model: PreTrainedModel, name: str) -> None:
    """Takes a tensor out of a model.

    Transformers would fill its place with random weights.
    """
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    holder: dict[str, Any] = module._parameters
    holder = holder if attribute in holder else module._buffers
    holder[attribute] = None
    # Spares it the initialisation, which would miss the weight.
    module._is_hf_initialized = True  # type: ignore[assignment]


def _names_in_file(model: PreTrainedModel, names: list[str]) -> dict[str, str]:
    """What ``save_pretrained`` calls the tensors of a model; nothing if it also changes them."""
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        conversions = get_model_conversion_mapping(model, add_legacy=False)
    if any(isinstance(conversion, WeightConverter) for conversion in conversions):
        return {}
    indices = {name: torch.tensor(index) for index, name in enumerate(names)}
    renamed = revert_weight_conversion(model, indices)
    return {names[int(index)]: name for name, index in renamed.items()}


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
