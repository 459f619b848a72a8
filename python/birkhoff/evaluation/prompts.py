"""What models are asked: points and boxes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from birkhoff.evaluation.metrics import Masks, iou

PromptKind = Literal["points", "boxes", "grid"]

#: Points on a side of the grid on which the original model is asked for its masks.
GRID = 8
#: Masks that overlap more than this are of one thing.
SAME_THING = 0.7
#: Masks that cover less than this share of the picture, or more than the other, are no things.
SMALLEST, LARGEST = 0.0005, 0.9


@dataclass(frozen=True)
class Prompt:
    """A point or a box, in pixels of the picture."""

    #: x and y.
    point: tuple[float, float] | None = None
    #: Left, top, right and bottom.
    box: tuple[float, float, float, float] | None = None


def grid_prompts(height: int, width: int, side: int = GRID) -> list[Prompt]:
    """``side`` x ``side`` points, evenly spread over the picture."""
    steps = (np.arange(side) + 0.5) / side
    return [Prompt(point=(float(x * width), float(y * height))) for y in steps for x in steps]


def prompt_for(mask: Masks, kind: PromptKind, rng: np.random.Generator) -> Prompt:
    """A random pixel of a mask that is not empty, or its bounding box."""
    rows, columns = np.nonzero(mask)
    if kind == "boxes":
        left, right = int(columns.min()), int(columns.max())
        top, bottom = int(rows.min()), int(rows.max())
        return Prompt(box=(left, top, right + 1, bottom + 1))
    index = rng.integers(len(rows))
    return Prompt(point=(float(columns[index]) + 0.5, float(rows[index]) + 0.5))


def distinct_masks(masks: Sequence[Masks], scores: Sequence[float]) -> list[int]:
    """Which masks are of different things, and neither tiny nor all of the picture; best first."""
    chosen: list[int] = []
    for index in sorted(range(len(masks)), key=lambda index: -scores[index]):
        mask = masks[index]
        if SMALLEST <= mask.mean() <= LARGEST and all(
            iou(mask, masks[other]) < SAME_THING for other in chosen
        ):
            chosen.append(index)
    return chosen
