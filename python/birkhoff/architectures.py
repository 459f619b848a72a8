"""Builds models from files: an original, and a compressed one of its architecture."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from birkhoff._core import BirkhoffError, FormatError
from birkhoff.checkpoint import Tensor, open_checkpoint
from birkhoff.models import load

#: Builders of the package segment_anything, by the width of their image encoder.
ARCHITECTURES = {768: "vit_b", 1024: "vit_l", 1280: "vit_h"}
#: A tensor that gives this width, by its name in the original package's checkpoints.
WIDTH_TENSOR = "image_encoder.patch_embed.proj.bias"

Builder = Callable[[], nn.Module]


def load_pair(
    compressed: Path, original: Path, architecture: str | None = None
) -> tuple[nn.Module, nn.Module]:
    """A compressed model and its original.

    Args:
        compressed: A file of ``birkhoff compress`` or ``birkhoff.save``, or a transformers folder.
        original: A transformers folder, or a bare checkpoint.
        architecture: As in :func:`builder`.

    Returns:
        The compressed model and the original.

    Raises:
        BirkhoffError: They do not fit each other, or an architecture is unknown.
        OSError: A file cannot be read.
    """
    restored = load_original(original, architecture)
    if compressed.is_dir():
        return load_folder(compressed), restored
    # As in transformers, what the model does not have is left out; what is missing is refused.
    strict = not original.is_dir()
    return load(compressed, builder(original, architecture), strict=strict), restored


def load_original(path: Path, architecture: str | None = None) -> nn.Module:
    """A model that is not compressed, in eval mode.

    Args:
        path: A transformers folder, or a bare checkpoint.
        architecture: As in :func:`builder`.

    Raises:
        BirkhoffError: The architecture is unknown, or the weights do not fit it.
        OSError: A file cannot be read.
    """
    if path.is_dir():
        return load_folder(path)
    return _load_bare(path, builder(path, architecture))


def builder(checkpoint: Path, architecture: str | None = None) -> Builder:
    """What makes a model of the architecture of a checkpoint, without its weights.

    Args:
        checkpoint: A transformers folder, or a bare checkpoint.
        architecture: What a bare checkpoint is of: ``vit_b``, ``vit_l`` or ``vit_h`` of the package
            segment_anything, or a folder with the ``config.json`` of a transformers model. If None,
            it follows from the shapes of the checkpoint's tensors where it is one of the three.

    Raises:
        BirkhoffError: The architecture is unknown, or its package is not installed.
        OSError: A file cannot be read.
    """
    if checkpoint.is_dir():
        return transformers_builder(checkpoint)
    if architecture is not None and Path(architecture).is_dir():
        return transformers_builder(Path(architecture))
    name = architecture or infer_architecture(open_checkpoint(checkpoint).tensors)
    if name is None:
        raise BirkhoffError(
            f"{checkpoint}: a checkpoint does not say what model it is of; name it with "
            "--architecture vit_b, vit_l or vit_h, or give a folder with the config.json of a "
            "transformers model"
        )
    if name not in ARCHITECTURES.values():
        raise BirkhoffError(
            f"{name}: this is no known architecture; name one of "
            f"{', '.join(ARCHITECTURES.values())}, or a folder that holds a config.json"
        )
    try:
        from segment_anything import sam_model_registry
    except ModuleNotFoundError as error:
        raise BirkhoffError(
            f"{checkpoint}: this is a checkpoint of the package segment_anything ({name}), which "
            "is not installed; install it from github.com/facebookresearch/segment-anything, or "
            "give the model as a transformers folder"
        ) from error
    make: Builder = sam_model_registry[name]
    return make


def infer_architecture(tensors: Sequence[Tensor]) -> str | None:
    """Which of the original Segment Anything models a checkpoint is of, by its shapes."""
    for tensor in tensors:
        if tensor.name == WIDTH_TENSOR and len(tensor.shape) == 1:
            return ARCHITECTURES.get(tensor.shape[0])
    return None


def _load_bare(path: Path, build: Builder) -> nn.Module:
    """A model with the weights of a bare checkpoint, which are read without running any code."""
    import torch

    from birkhoff.dtypes import TORCH_DTYPES

    dtypes = {
        name: getattr(torch, key.removeprefix("torch.")) for key, name in TORCH_DTYPES.items()
    }
    model = build()
    state_dict = {
        tensor.name: torch.from_numpy(tensor.read().copy())
        .view(dtypes[tensor.dtype])
        .reshape(tensor.shape)
        for tensor in open_checkpoint(path).tensors
    }
    try:
        keys = model.load_state_dict(state_dict, strict=False)
    except RuntimeError as error:
        raise FormatError(
            f"{path}: the checkpoint does not fit {type(model).__name__}: {error}"
        ) from error
    # Of tied tensors, a file may hold only the first.
    tensors = model.state_dict()
    loaded = {tensors[name].data_ptr() for name in state_dict if name in tensors}
    missing = [name for name in keys.missing_keys if tensors[name].data_ptr() not in loaded]
    if missing or keys.unexpected_keys:
        raise FormatError(
            f"{path}: the checkpoint does not fit {type(model).__name__}; missing: "
            f"{', '.join(missing) or 'nothing'}; unexpected: "
            f"{', '.join(keys.unexpected_keys) or 'nothing'}"
        )
    return model.eval()


def transformers_builder(folder: Path) -> Builder:
    """What makes the model of a transformers folder, without its weights.

    Raises:
        BirkhoffError: transformers is not installed, or does not know the model.
        OSError: The folder has no configuration.
    """
    model_class = _transformers_class(folder)
    config = model_class.config_class.from_pretrained(folder, local_files_only=True)
    return lambda: model_class(config)


def load_folder(folder: Path) -> nn.Module:
    """The model of a transformers folder, compressed or not.

    Raises:
        BirkhoffError: transformers is not installed, or the folder holds no model that it knows.
        OSError: The folder cannot be read.
    """
    model_class = _transformers_class(folder)
    from transformers.utils import logging

    import birkhoff.transformers  # noqa: F401  (registers the quantizer)

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        model = model_class.from_pretrained(folder, local_files_only=True)
    except (ValueError, RuntimeError) as error:
        raise BirkhoffError(f"{folder}: the model cannot be loaded: {error}") from error
    return model.eval()  # type: ignore[no-any-return]


def _transformers_class(folder: Path) -> Any:
    config = folder / "config.json"
    if not config.is_file():
        raise BirkhoffError(
            f"{folder}: the folder has no config.json; give a transformers folder or a checkpoint"
        )
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise BirkhoffError(
            f"{folder}: this is a transformers folder; install transformers to run its model"
        ) from error
    try:
        name = str(json.loads(config.read_bytes())["architectures"][0])
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise BirkhoffError(
            f"{config}: it does not say which class the model is of, in 'architectures'"
        ) from error
    model_class = getattr(transformers, name, None)
    if not (isinstance(model_class, type) and issubclass(model_class, nn.Module)):
        raise BirkhoffError(
            f"{config}: transformers {transformers.__version__} has no model {name!r}"
        )
    return model_class
