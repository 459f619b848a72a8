"""Average precision of masks, as COCO defines it, over all objects alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

#: An object is found if the IoU is at least this; the average is over all of them.
THRESHOLDS = np.linspace(0.5, 0.95, 10)
#: Precision is averaged over these recalls.
RECALLS = np.linspace(0, 1, 101)


@dataclass(frozen=True)
class Detections:
    """What a model found in one picture."""

    #: Shape (detections,).
    scores: NDArray[np.float64]
    #: IoU with each object, of shape (detections, objects).
    ious: NDArray[np.float64]


def average_precision(pictures: Sequence[Detections]) -> float:
    """AP over IoU thresholds from 0.5 to 0.95; NaN if there are no objects."""
    objects = sum(picture.ious.shape[1] for picture in pictures)
    if objects == 0:
        return float("nan")
    scores = np.concatenate([picture.scores for picture in pictures])
    order = np.argsort(-scores, kind="stable")
    averages = []
    for threshold in THRESHOLDS:
        found = np.concatenate([_match(picture, threshold) for picture in pictures])[order]
        true = np.cumsum(found)
        recall = true / objects
        precision = true / np.arange(1, len(true) + 1)
        # The best precision at this recall or a higher one.
        precision = np.maximum.accumulate(precision[::-1])[::-1]
        reached = np.searchsorted(recall, RECALLS - 1e-12)
        averages.append(np.append(precision, 0.0)[reached].mean())
    return float(np.mean(averages))


def _match(picture: Detections, threshold: float) -> NDArray[np.bool_]:
    """Which detections find an object that no better one has found."""
    free = np.ones(picture.ious.shape[1], dtype=np.bool_)
    found = np.zeros(len(picture.scores), dtype=np.bool_)
    for index in np.argsort(-picture.scores, kind="stable"):
        ious = np.where(free, picture.ious[index], -1.0)
        if len(ious) and ious.max() >= threshold - 1e-12:
            found[index] = True
            free[np.argmax(ious)] = False
    return found
