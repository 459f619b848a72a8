"""Models that segment what a prompt points at, behind one interface."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from birkhoff._core import BirkhoffError
from birkhoff.evaluation.metrics import Masks
from birkhoff.evaluation.pictures import Picture
from birkhoff.evaluation.prompts import Prompt

if TYPE_CHECKING:
    from torch import Tensor, nn

#: Prompts that a mask decoder answers in one go.
BATCH = 16
#: Of ImageNet, as all of the family normalise their pictures.
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Prediction:
    """What a model answers to one prompt.

    A point is answered with several masks, since it can mean a thing or a part of it; a box with
    one.
    """

    #: Boolean, of shape (masks, height, width).
    masks: Masks
    #: The IoU that the model itself predicts for each mask.
    scores: NDArray[np.float64]

    @property
    def best(self) -> int:
        """Which mask the model thinks best of."""
        return int(np.argmax(self.scores))


@runtime_checkable
class Predictor(Protocol):
    """A model with one picture set."""

    def set_image(self, image: Picture) -> None:
        """Takes the picture that prompts are about from now on."""

    def predict_all(self, prompts: Sequence[Prompt]) -> Iterator[Prediction]:
        """Answers prompts one after the other."""


def as_predictor(model: Any) -> Predictor:
    """A predictor around what the user has.

    Args:
        model: A transformers model of the SAM family, a predictor of one of the original packages
            (an object with ``set_image`` and ``predict``), their ``Sam`` model, or a
            :class:`Predictor`.

    Raises:
        TypeError: It is none of these.
    """
    if isinstance(model, Predictor):
        return model
    if hasattr(model, "set_image") and hasattr(model, "predict"):
        return OriginalPredictor(model)
    if hasattr(getattr(model, "config", None), "prompt_encoder_config"):
        return TransformersPredictor(model)
    if all(hasattr(model, part) for part in ("image_encoder", "prompt_encoder", "mask_decoder")):
        return OriginalPredictor(_original_predictor(model))
    raise TypeError(
        f"{type(model).__name__} is no model that segments: give a transformers model of the SAM "
        "family, or a predictor with set_image and predict, such as segment_anything.SamPredictor"
    )


def _original_predictor(model: Any) -> Any:
    try:
        from segment_anything import SamPredictor
    except ModuleNotFoundError as error:
        raise BirkhoffError(
            f"{type(model).__name__} is a model of the package segment_anything, which is not "
            "installed; install it, or give a predictor with set_image and predict"
        ) from error
    return SamPredictor(model)


class OriginalPredictor:
    """The interface around a predictor of the original packages."""

    def __init__(self, predictor: Any) -> None:
        self.predictor = predictor
        self.model: nn.Module | None = getattr(predictor, "model", None)

    def set_image(self, image: Picture) -> None:
        """Takes the picture that prompts are about from now on."""
        self.predictor.set_image(np.ascontiguousarray(image))

    def predict_all(self, prompts: Sequence[Prompt]) -> Iterator[Prediction]:
        """Answers prompts one after the other."""
        for prompt in prompts:
            if prompt.box is None:
                points = np.array([prompt.point], dtype=np.float32)
                masks, scores, _ = self.predictor.predict(
                    point_coords=points, point_labels=np.ones(1, int), multimask_output=True
                )
            else:
                box = np.array(prompt.box, dtype=np.float32)
                masks, scores, _ = self.predictor.predict(box=box, multimask_output=False)
            yield Prediction(
                np.asarray(masks).astype(np.bool_), np.asarray(scores, dtype=np.float64).ravel()
            )


class TransformersPredictor:
    """The interface around ``SamModel``, ``SamHQModel`` and ``Sam2Model`` of transformers."""

    def __init__(self, model: Any) -> None:
        self.model: nn.Module | None = model
        self._forward = model
        self._side = int(model.config.prompt_encoder_config.image_size)
        # SAM pads a picture to a square; SAM 2 stretches it.
        self._stretch = hasattr(model, "no_memory_embedding")
        self._mean, self._std = _normalisation(model)
        self._size = (0, 0)
        self._scaled = (0, 0)
        self._inputs: dict[str, Any] = {}

    def set_image(self, image: Picture) -> None:
        """Takes the picture that prompts are about from now on."""
        import torch

        self._size = (image.shape[0], image.shape[1])
        self._scaled = self._scaled_size(*self._size)
        with torch.inference_mode():
            embeddings = self._forward.get_image_embeddings(self.pixel_values(image))
        # Some models have features of more than one size.
        if isinstance(embeddings, tuple):
            self._inputs = {
                "image_embeddings": embeddings[0],
                "intermediate_embeddings": embeddings[1],
            }
        else:
            self._inputs = {"image_embeddings": embeddings}

    def predict_all(self, prompts: Sequence[Prompt]) -> Iterator[Prediction]:
        """Answers prompts one after the other."""
        for start in range(0, len(prompts), BATCH):
            batch = prompts[start : start + BATCH]
            boxes = [prompt.box is not None for prompt in batch]
            if any(boxes) != all(boxes):
                raise ValueError("points and boxes cannot be asked for in one go")
            logits, scores = self._decode(batch, multimask_output=not boxes[0])
            for of_prompt, of_scores in zip(logits, scores, strict=True):
                yield Prediction(self._masks(of_prompt), of_scores.double().numpy())

    def pixel_values(self, image: Picture) -> Tensor:
        """A picture as the model takes it: float32 of shape (1, 3, side, side)."""
        import torch
        from PIL import Image

        height, width = self._scaled_size(image.shape[0], image.shape[1])
        scaled = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
        values = (np.asarray(scaled, dtype=np.float32) / 255 - self._mean) / self._std
        padded = np.zeros((3, self._side, self._side), dtype=np.float32)
        padded[:, :height, :width] = values.transpose(2, 0, 1)
        return torch.from_numpy(padded)[None]

    def _scaled_size(self, height: int, width: int) -> tuple[int, int]:
        if self._stretch:
            return self._side, self._side
        scale = self._side / max(height, width)
        return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))

    def _decode(self, prompts: Sequence[Prompt], *, multimask_output: bool) -> tuple[Any, Any]:
        """Logits of shape (prompts, masks, height, width) and scores of shape (prompts, masks)."""
        import torch

        scale = np.array(self._scaled[::-1]) / np.array(self._size[::-1])
        if multimask_output:
            points = np.array([prompt.point for prompt in prompts]) * scale
            asked = {"input_points": torch.from_numpy(points).float()[None, :, None]}
            asked["input_labels"] = torch.ones(1, len(prompts), 1, dtype=torch.int64)
        else:
            corners = np.array([prompt.box for prompt in prompts]) * np.tile(scale, 2)
            asked = {"input_boxes": torch.from_numpy(corners).float()[None]}
        with torch.inference_mode():
            output = self._forward(**self._inputs, **asked, multimask_output=multimask_output)
        return output.pred_masks[0].float(), output.iou_scores[0]

    def _masks(self, logits: Tensor) -> Masks:
        """Masks of the picture's size from logits of shape (masks, height, width)."""
        from torch.nn import functional

        options: dict[str, Any] = {"mode": "bilinear", "align_corners": False}
        full = functional.interpolate(logits[None], (self._side, self._side), **options)
        height, width = self._scaled
        full = functional.interpolate(full[:, :, :height, :width], self._size, **options)
        masks: Masks = (full[0] > 0).numpy()
        return masks


def _normalisation(model: Any) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Mean and deviation of the pixels, by the preprocessor of the model's folder if it has one."""
    mean, std = IMAGE_MEAN, IMAGE_STD
    path = Path(str(getattr(model, "name_or_path", ""))) / "preprocessor_config.json"
    if path.is_file():
        try:
            settings = json.loads(path.read_bytes())
            mean = tuple(map(float, settings.get("image_mean", mean)))  # type: ignore[assignment]
            std = tuple(map(float, settings.get("image_std", std)))  # type: ignore[assignment]
        except (ValueError, TypeError, AttributeError) as error:
            raise BirkhoffError(f"{path}: this is no description of a preprocessor") from error
        if len(mean) != 3 or len(std) != 3 or not min(std) > 0:
            raise BirkhoffError(f"{path}: image_mean and image_std must have three values each")
    return np.array(mean, dtype=np.float32), np.array(std, dtype=np.float32)
