"""Runs a model and its original on the same pictures and prompts, and compares their masks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from birkhoff._core import BirkhoffError
from birkhoff.evaluation.annotations import Annotations, read_annotations
from birkhoff.evaluation.detection import Detections, average_precision
from birkhoff.evaluation.layers import layer_sqnr
from birkhoff.evaluation.metrics import Masks, boundary_f, iou
from birkhoff.evaluation.pictures import Picture, find_pictures, read_picture
from birkhoff.evaluation.predictors import Prediction, Predictor, as_predictor
from birkhoff.evaluation.prompts import (
    Prompt,
    PromptKind,
    distinct_masks,
    grid_prompts,
    prompt_for,
)
from birkhoff.summary import finite

#: Called after every picture with its name, how many are done, and of how many.
Progress = Callable[[str, int, int], None]

#: Pixels of the longer side of an example, at most.
EXAMPLE_SIDE = 480


@dataclass(frozen=True)
class Comparison:
    """The answers of both models to one prompt.

    Each model has one mask that it thinks best of.
    """

    picture: Path
    prompt: Prompt
    #: IoU of the best mask of the one with the best mask of the other.
    iou: float
    #: IoU of the original's best mask with the same of the compressed model's several masks.
    same_mask_iou: float
    #: Boundary F of their best masks.
    boundary_f: float
    #: The IoU that the original predicts for its best mask, and the compressed model for the same.
    original_score: float
    compressed_score: float
    #: Whether they think best of different ones of their masks.
    best_changed: bool


@dataclass(frozen=True)
class Example:
    """A comparison with what there is to see, scaled down where the picture is large."""

    comparison: Comparison
    picture: Picture = field(repr=False)
    original: Masks = field(repr=False)
    compressed: Masks = field(repr=False)
    #: Pixels here for a pixel of the picture.
    scale: float


@dataclass(frozen=True)
class GroundTruth:
    """Both models against annotations."""

    objects: int
    #: Mean IoU with the objects: of the mask that an object was prompted for, or, with a grid of
    #: points, of the mask that fits it best.
    original_miou: float
    compressed_miou: float
    #: Average precision of masks, all objects alike; NaN if no prompt belongs to an object.
    original_ap: float
    compressed_ap: float


@dataclass(frozen=True)
class Evaluation:
    """How well a compressed model keeps the masks of its original."""

    prompts: PromptKind
    pictures: list[Path]
    comparisons: list[Comparison]
    #: The prompts with the lowest IoU, the worst first.
    worst: list[Example] = field(repr=False)
    #: SQNR of each coded tensor in dB; empty if the models are not both at hand.
    layer_sqnr: dict[str, float]
    ground_truth: GroundTruth | None

    @property
    def mean_iou(self) -> float:
        """Mean IoU between the masks of the two models."""
        return _mean(comparison.iou for comparison in self.comparisons)

    @property
    def worst_iou(self) -> float:
        """The lowest of them."""
        return min(comparison.iou for comparison in self.comparisons)

    @property
    def mean_same_mask_iou(self) -> float:
        """Mean IoU where the original's choice among several masks is taken from both."""
        return _mean(comparison.same_mask_iou for comparison in self.comparisons)

    @property
    def mean_boundary_f(self) -> float:
        """Mean boundary F between their masks."""
        return _mean(comparison.boundary_f for comparison in self.comparisons)

    @property
    def mean_score_difference(self) -> float:
        """Mean absolute difference of the IoU that they predict for the same mask."""
        return _mean(abs(c.compressed_score - c.original_score) for c in self.comparisons)

    @property
    def best_changed_share(self) -> float:
        """Share of the prompts for which they think best of different masks."""
        return _mean(comparison.best_changed for comparison in self.comparisons)

    def to_json(self) -> dict[str, Any]:
        """All but pictures and masks as JSON values; what is infinite or undefined is null."""
        truth = self.ground_truth
        return {
            "prompts": self.prompts,
            "pictures": len(self.pictures),
            "comparisons": len(self.comparisons),
            "mean_iou": self.mean_iou,
            "worst_iou": self.worst_iou,
            "mean_same_mask_iou": self.mean_same_mask_iou,
            "mean_boundary_f": self.mean_boundary_f,
            "mean_score_difference": self.mean_score_difference,
            "best_changed_share": self.best_changed_share,
            "ground_truth": truth
            and {
                "objects": truth.objects,
                "original_miou": finite(truth.original_miou),
                "compressed_miou": finite(truth.compressed_miou),
                "original_ap": finite(truth.original_ap),
                "compressed_ap": finite(truth.compressed_ap),
            },
            "layer_sqnr_db": {name: finite(ratio) for name, ratio in self.layer_sqnr.items()},
            "prompt_results": [
                {
                    "picture": str(comparison.picture),
                    "point": comparison.prompt.point,
                    "box": comparison.prompt.box,
                    "iou": comparison.iou,
                    "same_mask_iou": comparison.same_mask_iou,
                    "boundary_f": comparison.boundary_f,
                    "original_score": comparison.original_score,
                    "compressed_score": comparison.compressed_score,
                    "best_changed": comparison.best_changed,
                }
                for comparison in self.comparisons
            ],
        }


def evaluate(
    compressed: Any,
    original: Any,
    images: str | Path | Sequence[str | Path],
    *,
    prompts: PromptKind = "points",
    annotations: Annotations | str | Path | None = None,
    prompts_per_picture: int = 16,
    seed: int = 0,
    examples: int = 24,
    progress: Progress | None = None,
) -> Evaluation:
    """Compares the masks of a compressed model with those of its original.

    No labels are needed. Points and boxes are drawn from the masks that the original finds with a
    grid of points: a random pixel of each, or its bounding box. With annotations they are drawn
    from the objects instead, and both models are measured against these too.

    Args:
        compressed: A transformers model of the SAM family, a predictor of one of the original
            packages (``set_image`` and ``predict``), or any
            :class:`~birkhoff.evaluation.predictors.Predictor`.
        original: The same, before it was compressed.
        images: A folder, which is searched with all folders in it, or a list of pictures.
        prompts: ``"points"``, ``"boxes"``, or ``"grid"``, 8 x 8 points over each picture.
        annotations: A file in the format of COCO, or what was read from it.
        prompts_per_picture: The most points or boxes for a picture.
        seed: Of the random choices.
        examples: How many of the worst prompts to keep with their masks.
        progress: Called after every picture.

    Raises:
        BirkhoffError: There is no picture, one cannot be read, the annotations are of other
            pictures, or the models do not belong together.
        ValueError: An argument is wrong.
        TypeError: A model cannot be prompted.
    """
    if prompts not in ("points", "boxes", "grid"):
        raise ValueError(f"prompts are 'points', 'boxes' or 'grid', not {prompts!r}")
    if prompts_per_picture < 1:
        raise ValueError(f"there must be 1 prompt a picture or more, not {prompts_per_picture}")
    paths = find_pictures(images)
    if isinstance(annotations, str | Path):
        annotations = read_annotations(annotations)
    if annotations is not None and all(annotations.name_of(path) is None for path in paths):
        raise BirkhoffError(
            f"{annotations.path}: none of the {len(paths)} pictures is annotated there, such as "
            f"{paths[0].name!r}; give the annotations of these pictures"
        )
    pair = _Pair(as_predictor(original), as_predictor(compressed))
    ratios = pair.layer_sqnr()
    run = _Run(pair, prompts, annotations, prompts_per_picture, seed, examples)
    for done, path in enumerate(paths, start=1):
        run.add(path)
        if progress is not None:
            progress(path.name, done, len(paths))
    if not run.comparisons:
        raise BirkhoffError(
            "there was nothing to prompt for: no picture has an annotated object"
            if annotations is not None
            else "there was nothing to prompt for: the original found nothing in any picture; "
            "try a grid of points as prompts"
        )
    return Evaluation(
        prompts, paths, run.comparisons, run.worst, ratios, run.ground_truth.summarize()
    )


@dataclass(frozen=True)
class _Pair:
    original: Predictor
    compressed: Predictor

    def layer_sqnr(self) -> dict[str, float]:
        models = [
            getattr(predictor, "model", None) for predictor in (self.original, self.compressed)
        ]
        if any(not hasattr(model, "state_dict") for model in models):
            return {}
        return layer_sqnr(models[0], models[1])  # type: ignore[arg-type]

    def set_image(self, picture: Picture) -> None:
        self.original.set_image(picture)
        self.compressed.set_image(picture)

    def predict_all(self, prompts: Sequence[Prompt]) -> Iterable[tuple[Prediction, Prediction]]:
        answers = zip(
            self.original.predict_all(prompts), self.compressed.predict_all(prompts), strict=True
        )
        for original, compressed in answers:
            if original.masks.shape != compressed.masks.shape:
                raise BirkhoffError(
                    "the models do not belong together: to one prompt the original answers with "
                    f"masks of shape {original.masks.shape}, the compressed model "
                    f"{compressed.masks.shape}"
                )
            yield original, compressed


class _Run:
    """Goes through the pictures and collects."""

    def __init__(
        self,
        pair: _Pair,
        kind: PromptKind,
        annotations: Annotations | None,
        count: int,
        seed: int,
        examples: int,
    ) -> None:
        self.pair = pair
        self.kind: PromptKind = kind
        self.annotations = annotations
        self.count = count
        self.rng = np.random.default_rng(seed)
        self.examples = examples
        self.comparisons: list[Comparison] = []
        self.worst: list[Example] = []
        self.ground_truth = _TruthCollector(measured=annotations is not None)

    def add(self, path: Path) -> None:
        """Compares the models on one picture."""
        picture = read_picture(path)
        height, width = picture.shape[:2]
        objects: list[Masks] = []
        if self.annotations is not None:
            objects = self.annotations.masks(path, height, width)
            if not objects:
                return
        self.pair.set_image(picture)
        if self.kind == "grid":
            prompts = grid_prompts(height, width)
        else:
            if self.annotations is None:
                things = self._things_of_original(height, width)
            else:
                chosen = self.rng.permutation(len(objects))[: self.count]
                things = objects = [objects[index] for index in sorted(chosen)]
            prompts = [prompt_for(thing, self.kind, self.rng) for thing in things]
        predictions = []
        for prompt, (original, compressed) in zip(
            prompts, self.pair.predict_all(prompts), strict=True
        ):
            self._compare(path, picture, prompt, original, compressed)
            if self.annotations is not None:
                predictions.append((original, compressed))
        if self.annotations is not None:
            self.ground_truth.add(objects, predictions, prompted=self.kind != "grid")

    def _things_of_original(self, height: int, width: int) -> list[Masks]:
        found = list(self.pair.original.predict_all(grid_prompts(height, width)))
        masks = [prediction.masks[prediction.best] for prediction in found]
        scores = [float(prediction.scores[prediction.best]) for prediction in found]
        return [masks[index] for index in distinct_masks(masks, scores)[: self.count]]

    def _compare(
        self,
        path: Path,
        picture: Picture,
        prompt: Prompt,
        original: Prediction,
        compressed: Prediction,
    ) -> None:
        best = original.best
        mask, other = original.masks[best], compressed.masks[compressed.best]
        comparison = Comparison(
            picture=path,
            prompt=prompt,
            iou=float(iou(mask, other)),
            same_mask_iou=float(iou(mask, compressed.masks[best])),
            boundary_f=float(boundary_f(mask, other)),
            original_score=float(original.scores[best]),
            compressed_score=float(compressed.scores[best]),
            best_changed=best != compressed.best,
        )
        self.comparisons.append(comparison)
        if len(self.worst) < self.examples or (
            self.worst and comparison.iou < self.worst[-1].comparison.iou
        ):
            step = -(-max(picture.shape) // EXAMPLE_SIDE)
            small = (slice(None, None, step), slice(None, None, step))
            shown = picture[small].copy(), mask[small].copy(), other[small].copy()
            self.worst.append(Example(comparison, *shown, scale=1 / step))
            self.worst.sort(key=lambda example: example.comparison.iou)
            del self.worst[self.examples :]


class _TruthCollector:
    """Both models against the objects of each picture."""

    def __init__(self, *, measured: bool) -> None:
        self.measured = measured
        self.ious: tuple[list[float], list[float]] = ([], [])
        self.detections: tuple[list[Detections], list[Detections]] = ([], [])

    def add(
        self,
        objects: Sequence[Masks],
        predictions: Sequence[tuple[Prediction, Prediction]],
        *,
        prompted: bool,
    ) -> None:
        truth = np.stack(objects)
        for side in (0, 1):
            answers = [prediction[side] for prediction in predictions]
            masks = [answer.masks[answer.best] for answer in answers]
            scores = [float(answer.scores[answer.best]) for answer in answers]
            ious = np.stack([iou(mask, truth) for mask in masks])
            # Each prompt is for one object, in the same order; a grid is for all of them.
            self.ious[side].extend(np.diag(ious) if prompted else ious.max(axis=0))
            if not prompted:
                kept = distinct_masks(masks, scores)
                ious, scores = ious[kept], [scores[index] for index in kept]
            self.detections[side].append(Detections(np.array(scores), ious))

    def summarize(self) -> GroundTruth | None:
        if not self.measured:
            return None
        original, compressed = (float(np.mean(ious)) for ious in self.ious)
        return GroundTruth(
            objects=len(self.ious[0]),
            original_miou=original,
            compressed_miou=compressed,
            original_ap=average_precision(self.detections[0]),
            compressed_ap=average_precision(self.detections[1]),
        )


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return math.fsum(values) / len(values)
