"""Prompts on held-out scenes, and the masks that a transformers `SamModel` draws for them."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scenes import SIZE, BoolArray, UInt8Array, box_of, inner_point
from torch import Tensor
from torch.nn import functional

PROMPTS = 4  # a scene
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)  # of ImageNet, as in SamProcessor
STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)

Mode = Literal["point", "box"]


class Prompted(NamedTuple):
    """Scenes with `PROMPTS` shapes each to be segmented; a scene with fewer repeats them."""

    images: UInt8Array  # (n, SIZE, SIZE, 3)
    masks: BoolArray  # (n, PROMPTS, SIZE, SIZE), the visible masks
    points: NDArray[np.float32]  # (n, PROMPTS, 2), x and y
    boxes: NDArray[np.float32]  # (n, PROMPTS, 4), x0, y0, x1, y1


def prompt_scenes(images: UInt8Array, labels: UInt8Array, min_area: int, seed: int = 0) -> Prompted:
    """`PROMPTS` shapes of each scene, drawn by `seed`, of those with at least `min_area` visible
    pixels; the point is the one farthest from the border of the visible mask. Scenes without such a
    shape are left out."""
    rng = np.random.default_rng(seed)
    kept, masks = [], []
    for i, label_map in enumerate(labels):
        areas = np.bincount(label_map.ravel())
        shapes = [k for k in range(1, len(areas)) if areas[k] >= min_area]
        if shapes:
            kept.append(i)
            chosen = np.resize(rng.permutation(shapes), PROMPTS)
            masks.append(np.stack([label_map == k for k in chosen]))
    return Prompted(
        np.asarray(images[kept]),
        np.stack(masks),
        np.array([[inner_point(mask) for mask in scene] for scene in masks], np.float32),
        np.array([[box_of(mask) for mask in scene] for scene in masks], np.float32),
    )


def pixel_values(images: UInt8Array) -> Tensor:
    """(n, height, width, 3) in 0..255 to the model's (n, 3, height, width)."""
    return (torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 255 - MEAN) / STD


@torch.no_grad()
def predict_masks(model: Any, scenes: Prompted, batch: int = 10) -> dict[Mode, BoolArray]:
    """The single mask (`multimask_output=False`) for every point and every box, each (n, PROMPTS,
    SIZE, SIZE)."""
    found: dict[Mode, list[BoolArray]] = {"point": [], "box": []}
    for start in range(0, len(scenes.images), batch):
        part = slice(start, start + batch)
        embeddings = model.get_image_embeddings(pixel_values(scenes.images[part]))
        points = torch.from_numpy(scenes.points[part])[:, :, None]
        prompts: dict[Mode, dict[str, Tensor]] = {
            "point": {
                "input_points": points,
                "input_labels": torch.ones(points.shape[:3], dtype=torch.int64),
            },
            "box": {"input_boxes": torch.from_numpy(scenes.boxes[part])},
        }
        for mode, prompt in prompts.items():
            logits = (
                model(image_embeddings=embeddings, multimask_output=False, **prompt)
                .pred_masks[:, :, 0]
                .float()
            )
            full = functional.interpolate(
                logits, (SIZE, SIZE), mode="bilinear", align_corners=False
            )
            found[mode].append((full > 0).numpy())
    return {mode: np.concatenate(masks) for mode, masks in found.items()}
