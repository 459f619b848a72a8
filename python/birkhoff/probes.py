"""Runs models on synthetic inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from birkhoff.synthetic import Kind, synthetic_picture

#: Runs a model on inputs of its choice; each row of what it returns is one answer.
Probe = Callable[[nn.Module], Sequence[Tensor]]

#: Synthetic pictures, one half of either kind; fewer where each takes long.
PICTURES, LARGE_PICTURES = 4, 2
#: Pixels of the side of a picture that takes long.
LARGE_SIDE = 512
#: Pixels of all pictures of a thorough run, if that is at least `PICTURES` and not above the most.
THOROUGH_PIXELS, MOST_PICTURES = 1 << 20, 64
#: Points, and as many boxes, on each of them.
PROMPTS = 8
#: Sequences of random tokens for a language model, and tokens in each.
SEQUENCES, THOROUGH_SEQUENCES, TOKENS = 16, 128, 32
#: Of ImageNet.
IMAGE_MEAN = np.array([0.485, 0.456, 0.406], dtype=np.float32)
IMAGE_STD = np.array([0.229, 0.224, 0.225], dtype=np.float32)


def probe_for(model: nn.Module, *, thorough: bool = False, seed: int = 0) -> Probe | None:
    """What runs a model on synthetic inputs; None if it is not known what the model takes.

    Known are the SAM family of transformers, the models of the package segment_anything, and models
    of transformers that take pictures or tokens.

    Args:
        model: The model.
        thorough: Run it on more inputs, as many as the statistics of its layers ask for.
        seed: Of the inputs.
    """
    rng = np.random.default_rng(seed)
    config: Any = getattr(model, "config", None)
    if hasattr(config, "prompt_encoder_config"):
        side = int(config.prompt_encoder_config.image_size)
        return _Segmentation(_pictures(side, rng, thorough), rng, _run_transformers)
    if all(hasattr(model, part) for part in ("image_encoder", "prompt_encoder", "mask_decoder")):
        side = int(model.image_encoder.img_size)  # type: ignore[union-attr, arg-type]
        return _Segmentation(_pictures(side, rng, thorough), rng, _run_original)
    if isinstance(getattr(config, "vocab_size", None), int):
        sequences = THOROUGH_SEQUENCES if thorough else SEQUENCES
        return _Tokens(rng.integers(0, int(config.vocab_size), (sequences, TOKENS)))
    if isinstance(getattr(config, "image_size", None), int):
        return _Pictures(_pictures(int(config.image_size), rng, thorough))
    return None


class _Segmentation:
    """Points and boxes on pictures; the answers are masks and the scores predicted for them."""

    def __init__(self, pictures: Tensor, rng: np.random.Generator, run: Any) -> None:
        self.pictures = pictures
        self.run = run
        side = pictures.shape[-1]
        shape = (len(self.pictures), PROMPTS, 2)
        self.points = torch.from_numpy(rng.uniform(0.05, 0.95, shape) * side).float()
        sizes = rng.uniform(0.08, 0.45, shape) * side / 2
        centres = rng.uniform(0.1, 0.9, shape) * side
        corners = np.concatenate([centres - sizes, centres + sizes], axis=-1)
        self.boxes = torch.from_numpy(np.clip(corners, 0, side)).float()

    def __call__(self, model: nn.Module) -> list[Tensor]:
        answers = []
        for picture, points, boxes in zip(self.pictures, self.points, self.boxes, strict=True):
            for masks, scores in self.run(model, picture[None], points, boxes):
                answers += [masks.float().sigmoid().flatten(-2), scores.float()]
        return answers


def _run_transformers(model: Any, picture: Tensor, points: Tensor, boxes: Tensor) -> Any:
    embeddings = model.get_image_embeddings(picture)
    inputs = {"image_embeddings": embeddings}
    if isinstance(embeddings, tuple):
        inputs = {"image_embeddings": embeddings[0], "intermediate_embeddings": embeddings[1]}
    labels = torch.ones(1, len(points), 1, dtype=torch.int64)
    for prompt, several in (
        ({"input_points": points[None, :, None], "input_labels": labels}, True),
        ({"input_boxes": boxes[None]}, False),
    ):
        output = model(**inputs, **prompt, multimask_output=several)
        yield output.pred_masks[0], output.iou_scores[0]


def _run_original(model: Any, picture: Tensor, points: Tensor, boxes: Tensor) -> Any:
    embeddings = model.image_encoder(picture)
    labels = torch.ones(len(points), 1, dtype=torch.int64)
    for prompt, several in (
        ({"points": (points[:, None], labels), "boxes": None}, True),
        ({"points": None, "boxes": boxes}, False),
    ):
        sparse, dense = model.prompt_encoder(**prompt, masks=None)
        yield model.mask_decoder(
            image_embeddings=embeddings,
            image_pe=model.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=several,
        )


class _Pictures:
    """Pictures; the answers are all floats that come out."""

    def __init__(self, pictures: Tensor) -> None:
        self.pictures = pictures

    def __call__(self, model: nn.Module) -> list[Tensor]:
        parts = torch.split(self.pictures, PICTURES)
        return [answers for part in parts for answers in _float_outputs(model(pixel_values=part))]


class _Tokens:
    """Random tokens; the answers are all floats that come out, one a token."""

    def __init__(self, tokens: NDArray[np.int64]) -> None:
        self.tokens = torch.from_numpy(tokens)

    def __call__(self, model: nn.Module) -> list[Tensor]:
        return _float_outputs(
            model(input_ids=self.tokens, attention_mask=torch.ones_like(self.tokens))
        )


def _float_outputs(output: Any) -> list[Tensor]:
    values = output.values() if isinstance(output, dict) else output
    return [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]


def _pictures(side: int, rng: np.random.Generator, thorough: bool) -> Tensor:
    """Normalised pictures: float32 of shape (n, 3, side, side)."""
    kinds: tuple[Kind, ...] = ("dead leaves", "noise")
    count = PICTURES if side < LARGE_SIDE else LARGE_PICTURES
    if thorough:
        count = min(max(PICTURES, THOROUGH_PIXELS // side**2), MOST_PICTURES)
    drawn = [synthetic_picture(side, rng, kind=kinds[i % 2]) for i in range(count)]
    normalised = (np.stack(drawn) - IMAGE_MEAN) / IMAGE_STD
    return torch.from_numpy(normalised.transpose(0, 3, 1, 2).copy())
