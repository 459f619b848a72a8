"""Compresses, saves and loads torch models."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor, nn

from birkhoff import _core
from birkhoff._core import Entry, FormatError, Writer
from birkhoff.allocation import Target, check_target
from birkhoff.allocation.effects import measure_effects
from birkhoff.arrays import tensor_bytes
from birkhoff.compression import Rules, check_output, check_rules, coded_names, decide
from birkhoff.dtypes import TORCH_DTYPES
from birkhoff.feedback import Feedback
from birkhoff.files import require_compressed
from birkhoff.nn.coded import PARTS, CodedLayer, CodedParameter
from birkhoff.nn.placement import coded_forms, coded_parameters, place
from birkhoff.nn.skeleton import parameters_on_meta
from birkhoff.plan import Coded, Item, Stored, Tied, matches_any, plan_stored
from birkhoff.precision import Precision, checked
from birkhoff.probes import Probe, probe_for
from birkhoff.torch_checkpoint import tensors_of

Model = TypeVar("Model", bound=nn.Module)

#: The attribute under which a model keeps the settings that it was compressed with.
SETTINGS = "birkhoff_settings"


def compress(
    model: Model,
    bits: int | None = None,
    codec: str = "shift",
    rules: Rules = (),
    skip: Sequence[str] = (),
    precision: Precision | None = None,
    *,
    target_sqnr: float | None = None,
    target_ratio: float | None = None,
    auto: bool | Probe = False,
    feedback: bool | Probe = False,
) -> Model:
    """Compresses a model in place.

    The result is that of :func:`load` from the file which ``birkhoff compress`` makes of its state
    dict: weights of ``nn.Linear`` and of convolutions whose windows do not overlap stay coded in
    memory, in :class:`birkhoff.nn.HyperLinear` and :class:`birkhoff.nn.HyperConv2d`; other coded
    tensors are decoded; the rest is rounded to float16 where that loses next to nothing, but keeps
    its dtype. No parameter takes a gradient any more.

    Args:
        model: A model on the CPU in eval mode.
        bits: Code bits a weight of the bulk of the model, 4 if None; :mod:`birkhoff.policy` says
            what small and sensitive tensors get.
        codec: ``"shift"`` or ``"winding"``.
        rules: Name patterns (as of :mod:`fnmatch`) and the bits of the tensors that match, 16 for
            not coded; later ones win.
        skip: Name patterns of tensors to keep exactly as they are.
        precision: That of the coded layers; None for what :func:`birkhoff.set_precision` has set.
        target_sqnr: Instead of ``bits``: each tensor gets the fewest bits that reach this SQNR, in
            dB.
        target_ratio: Instead of ``bits``: the file of :func:`save` is to be this many times
            smaller than the tensors, and the bits of each are chosen for the least error.
        auto: Choose the bits of each tensor by its effect on the outputs of the model for synthetic
            inputs, at the size that it would have without, or of ``target_ratio``. For a model
            that birkhoff has no inputs for, give a function that runs it and returns the outputs
            that count, one answer a row.
        feedback: Run the model on synthetic inputs, and choose the codes of each layer for the
            least error of its outputs for them. For a model that birkhoff has no inputs for, give
            a function that runs it.

    Returns:
        The model itself.

    Raises:
        ValueError: An argument is wrong, a pattern matches nothing, or the model cannot be
            compressed; it is then as it was.
    """
    targeted = check_target(bits, target_sqnr, target_ratio, auto)
    bits = 4 if bits is None else bits
    user_rules = check_rules(rules, bits, codec)
    if precision is not None:
        checked(precision)
    _check_compressible(model)
    target = None
    if targeted:
        measure = None
        if auto:
            run = _probe(model, auto, "auto")
            measure = partial(measure_effects, model, probe=run, codec=codec)
        target = Target(target_sqnr, target_ratio, measure)
    run_for_moments = None
    if feedback:
        run_for_moments = _probe(model, feedback, "feedback", thorough=True)
    state_dict = _state_dict(model)
    tensors = tensors_of(state_dict, type(model).__name__)
    plan, settings = decide(
        tensors, bits=bits, codec=codec, user_rules=user_rules, skip=skip, target=target
    )
    factors = None
    if run_for_moments is not None:
        factors = Feedback(model, run_for_moments, coded_names(plan))
        settings["feedback"] = True
    parameters: dict[str, CodedParameter] = {}
    for item in plan:
        name = item.tensor.name
        if isinstance(item, Coded) and _holds(model, name):
            factor = None if factors is None else factors.factor(name, item.cols)
            parameters[name] = encode(item, codec, state_dict[name].dtype, factor)
        elif isinstance(item, Tied) and item.to in parameters:
            parameters[name] = parameters[item.to]
    place(model, parameters, precision)
    round_stored(model, plan)
    setattr(model, SETTINGS, settings)
    # Modules that keep something computed from their tensors in eval mode compute it again.
    return model.eval()


def round_stored(model: nn.Module, plan: Sequence[Item]) -> None:
    """Rounds the tensors of a model that a plan stores in 16 bit."""
    state_dict = model.state_dict()
    for item in plan:
        if isinstance(item, Stored) and item.dtype == "F16":
            tensor = state_dict[item.tensor.name]
            if tensor.dtype != torch.float16:
                tensor.copy_(tensor.half())


def save(model: nn.Module, path: str | Path, *, overwrite: bool = False) -> int:
    """Writes a compressed model as one file, which :func:`load` and the command line read.

    The names of its tensors are those of the state dict. Codes are written as they are; the rest is
    stored as by ``birkhoff compress``.

    Args:
        model: A model that :func:`compress` or :func:`load` has returned.
        path: The safetensors file to write; it is there as a whole or not at all.
        overwrite: Replace the file if it exists.

    Returns:
        The bytes written.

    Raises:
        ValueError: The model is not compressed, or a tensor cannot be stored.
        OSError: The file exists or cannot be written.
    """
    path = Path(path)
    check_output(path, overwrite=overwrite)
    settings = json.dumps(getattr(model, SETTINGS, {}))
    contents = file_contents(model)
    entries = [entry for entry, _ in contents]
    with Writer(path, entries, settings=settings, overwrite=overwrite) as writer:
        for (_, name, *_), content in contents:
            if isinstance(content, CodedParameter):
                writer.write_coded(name, *(part_bytes(part) for part in content.parts()))
            elif content is not None:
                writer.write(name, content.tensor.read())
        return writer.finish()


def file_contents(
    model: nn.Module,
) -> list[tuple[tuple[Any, ...], CodedParameter | Stored | None]]:
    """The plan for the file of a compressed model, as a writer takes it, and what each item holds.

    In the order of the state dict, coded tensors where their parts are. A tied one holds nothing.

    Raises:
        ValueError: The model is not compressed, or a tensor cannot be stored.
    """
    coded = coded_parameters(model)
    if not coded:
        raise ValueError(
            f"{type(model).__name__} holds no coded parameters; call birkhoff.compress(model) first"
        )
    skip = getattr(model, SETTINGS, {}).get("skip", [])
    state_dict = _state_dict(model)
    part_of = {f"{name}.{part}": name for name in coded for part in PARTS}
    plain = {key: tensor for key, tensor in state_dict.items() if key not in part_of}
    stored = {tensor.name: tensor for tensor in tensors_of(plain, type(model).__name__)}
    contents: list[tuple[tuple[Any, ...], CodedParameter | Stored | None]] = []
    first_names: dict[CodedParameter, str] = {}
    for name in dict.fromkeys(part_of.get(key, key) for key in state_dict):
        if name in coded:
            parameter = coded[name]
            what = (name, TORCH_DTYPES[str(_decoded_dtype(model, name))], parameter.shape)
            first_name = first_names.setdefault(parameter, name)
            if first_name != name:
                contents.append((("tied", *what, first_name), None))
                continue
            matrix = (*parameter.matrix_shape, parameter.bits, parameter.codec)
            contents.append((("coded", *what, *matrix), parameter))
        else:
            tensor = stored[name]
            what = (name, tensor.dtype, tensor.shape)
            if tensor.tied_to is not None:
                contents.append((("tied", *what, tensor.tied_to), None))
                continue
            exact = matches_any(name, skip)
            item = Stored(tensor, tensor.dtype) if exact else plan_stored(tensor)
            contents.append((("stored", *what, item.dtype), item))
    return contents


def load(
    path: str | Path,
    model: Model | Callable[[], Model],
    *,
    strict: bool = True,
    precision: Precision | None = None,
    device: torch.device | str | None = None,
) -> Model:
    """Loads a compressed file into a model of its architecture, in place, and sets it to eval mode.

    Codes are memory-mapped: several processes share them, and nothing may change the file in place
    while the model is alive.

    Args:
        path: A file that ``birkhoff compress`` or :func:`save` has written.
        model: A model on the CPU, or a function that makes one, such as
            ``lambda: SamModel(config)``; then its parameters are never held in memory uncompressed.
        strict: Refuse a file that lacks tensors of the model or has others. Without it, a model
            that was given keeps what it has.
        precision: That of the coded layers; None for what :func:`birkhoff.set_precision` has set.
        device: Where the model goes; the CPU if None.

    Returns:
        The model.

    Raises:
        FormatError: The file is damaged, was not written by birkhoff, or does not fit the model;
            missing and unexpected tensors are listed. The model is then as it was.
        ValueError: The model is compressed already or not on the CPU, or there is no such
            precision.
        OSError: The file cannot be read.
    """
    path = Path(path)
    if precision is not None:
        checked(precision)
    file = require_compressed(path)
    entries = {entry.name: entry for entry in file.entries()}
    for name, entry in entries.items():
        if entry.coding != "tied":
            file.check(name)
    model = _built(model)
    _check_not_compressed(model)
    _check_on_cpu(model)
    targets = _state_dict(model)
    sources = _match(path, type(model).__name__, targets, entries, strict=strict)
    with safe_open(path, framework="pt") as tensors:
        parameters: dict[str, CodedParameter] = {}
        by_source: dict[str, CodedParameter] = {}
        for name, source in sources.items():
            entry = entries[source]
            if entry.coding == "coded":
                if source not in by_source:
                    by_source[source] = _mapped(tensors, entry, targets[name].dtype)
                parameters[name] = by_source[source]
        place(model, parameters, precision)
        stored = {
            name: tensors.get_tensor(source)
            for name, source in sources.items()
            if entries[source].coding == "stored"
        }
        _assign(model, stored)
    settings = json.loads(file.settings)
    setattr(model, SETTINGS, settings)
    # A second time for models in eval mode: those that keep something computed from their tensors
    # compute it again.
    model.eval()
    _check_materialised(model)
    if device is not None:
        model.to(device).eval()
    return model


def _probe(
    model: nn.Module, given: bool | Probe, argument: str, *, thorough: bool = False
) -> Probe:
    """What runs a model: the function that was given, or one of birkhoff's."""
    probe = given if callable(given) else probe_for(model, thorough=thorough)
    if probe is None:
        raise ValueError(
            f"it is not known what inputs {type(model).__name__} takes; give {argument} a function "
            "that runs the model and returns the outputs that count"
        )
    return probe


def _built(model: Model | Callable[[], Model]) -> Model:
    if isinstance(model, nn.Module):
        return cast("Model", model)
    with parameters_on_meta():
        return model()


def _check_not_compressed(model: nn.Module) -> None:
    if coded_parameters(model):
        raise ValueError(
            f"{type(model).__name__} is compressed already; start from the original model, or use "
            "load_state_dict to load the state of another compressed one"
        )


def _check_compressible(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"compress takes a torch.nn.Module, not {type(model).__name__}; for a checkpoint use "
            "birkhoff.compress_file"
        )
    _check_not_compressed(model)
    name = type(model).__name__
    if model.training:
        raise ValueError(
            f"{name} is in training mode and a compressed model cannot be trained; "
            "call model.eval() first"
        )
    for key, value in model.state_dict().items():
        if isinstance(value, Tensor) and value.device.type != "cpu":
            raise ValueError(
                f"{name} is compressed on the CPU, and {key!r} is on {value.device}; "
                "call model.cpu() first, or load weights if they are on the meta device"
            )
        # Quantized layers of torch keep their weights so.
        packed = value if isinstance(value, tuple) else ()
        if any(isinstance(each, Tensor) and each.is_quantized for each in packed):
            raise ValueError(
                f"{name} is quantized already: {key!r} holds a quantized weight; start from the "
                "original model"
            )


def _check_on_cpu(model: nn.Module) -> None:
    for name, tensor in _state_dict(model).items():
        if tensor.device.type not in ("cpu", "meta"):
            raise ValueError(
                f"{type(model).__name__} is loaded on the CPU, and {name!r} is on {tensor.device}; "
                "call model.cpu() first"
            )


def _state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the state dict, without what else modules put there."""
    return {
        name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)
    }


def _holds(model: nn.Module, name: str) -> bool:
    """Whether a name of the state dict is that of an attribute, and not made by a hook."""
    path, _, attribute = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return False
    return attribute in module._parameters or attribute in module._buffers


def _decoded_dtype(model: nn.Module, name: str) -> torch.dtype:
    """The dtype in which a model has a coded parameter decoded."""
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    if attribute in coded_forms(module):
        dtype: torch.dtype = getattr(module, attribute).dtype
        return dtype
    assert isinstance(module, CodedLayer)
    return module.coded_weight.dtype


def encode(
    item: Coded, codec: str, dtype: torch.dtype, factor: NDArray[np.float32] | None = None
) -> CodedParameter:
    """Encodes a tensor that is `dtype` in its model, with error feedback by `factor`.

    Raises:
        ValueError: It holds NaN or infinity.
    """
    tensor = item.tensor
    try:
        matrix, _ = _core.encode(
            tensor.read(),
            tensor.dtype,
            item.rows,
            item.cols,
            bits=item.bits,
            codec=codec,
            factor=factor,
        )
    except ValueError as error:
        raise ValueError(f"tensor {tensor.name!r}: {error}") from error
    return CodedParameter.from_matrix(matrix, tensor.shape, dtype)


def part_bytes(part: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return tensor_bytes(part.cpu())


def _match(
    path: Path,
    model_name: str,
    targets: Mapping[str, Tensor],
    entries: Mapping[str, Entry],
    *,
    strict: bool,
) -> dict[str, str]:
    """For each tensor of the model, the tensor of the file that holds its data."""
    sources: dict[str, str] = {}
    #: Names in the file by the tensor of the model, which may have several names.
    ties = {}
    for name, target in targets.items():
        if name in entries:
            sources[name] = entries[name].tied_to or name
            ties[_identity(target)] = sources[name]
    for name, target in targets.items():
        if name not in sources and _identity(target) in ties:
            sources[name] = ties[_identity(target)]
    problems = []
    for name, source in sources.items():
        shape, expected = tuple(entries[source].shape), tuple(targets[name].shape)
        if shape != expected:
            problems.append(f"{name!r} has shape {shape} in the file and {expected} in the model")
    if strict:
        missing = [repr(name) for name in targets if name not in sources]
        unexpected = [repr(name) for name in entries if name not in targets]
        if missing:
            problems.append("missing in the file: " + ", ".join(missing))
        if unexpected:
            problems.append("not in the model: " + ", ".join(unexpected))
    if problems:
        raise FormatError(f"{path}: the file does not fit {model_name}; " + "; ".join(problems))
    return sources


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    """The same for tensors that share all their memory."""
    if tensor.is_meta:
        # Detached tensors of one parameter share its storage.
        return (tensor.untyped_storage()._cdata, tensor.shape, tensor.stride())
    if tensor.numel() == 0:
        return (id(tensor),)
    return (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())


def _mapped(tensors: Any, entry: Entry, dtype: torch.dtype) -> CodedParameter:
    """A coded parameter in the memory map of its file."""
    assert entry.matrix_shape is not None
    assert entry.bits is not None
    assert entry.codec is not None
    codes, row_scales, group_exponents = (
        tensors.get_tensor(f"{entry.name}.{part}") for part in PARTS
    )
    return CodedParameter(
        codes,
        row_scales,
        group_exponents,
        entry.matrix_shape,
        bits=entry.bits,
        codec=entry.codec,
        shape=entry.shape,
        dtype=dtype,
    )


@torch.no_grad()
def _assign(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Gives the tensors of a model their values; those on the meta device are replaced."""
    replaced: dict[tuple[Any, ...], Tensor] = {}
    for name, value in values.items():
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        holder: Any = module._parameters
        if attribute not in holder:
            holder = module._buffers
        target = holder[attribute]
        if not target.is_meta:
            target.copy_(value)
            continue
        # What was one tensor stays one.
        identity = _identity(target.detach())
        if identity not in replaced:
            data = value.to(target.dtype, copy=True)
            is_parameter = isinstance(target, nn.Parameter)
            replaced[identity] = nn.Parameter(data, target.requires_grad) if is_parameter else data
        holder[attribute] = replaced[identity]


def _check_materialised(model: nn.Module) -> None:
    names = [name for name, tensor in model.named_parameters() if tensor.is_meta]
    names += [name for name, tensor in model.named_buffers() if tensor.is_meta]
    if names:
        raise ValueError(
            f"{type(model).__name__} has tensors without values, which the file does not hold: "
            f"{', '.join(map(repr, names))}; give the model itself instead of a function"
        )
