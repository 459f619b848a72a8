"""Segments pictures with a small trained model and with the same model compressed.

The model is a ``SamModel`` of 3.7 M parameters for pictures of 128 x 128 pixels, trained on drawn
scenes (``benches/accuracy/train.py``) and shipped in a file that birkhoff itself has compressed to
8 bits. Decoded, it is the original here.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from birkhoff._core import BirkhoffError
from birkhoff.compression import check_output, compress_file, decompress_file
from birkhoff.evaluation.metrics import Masks, iou
from birkhoff.evaluation.pictures import Picture, read_picture
from birkhoff.evaluation.predictors import TransformersPredictor
from birkhoff.evaluation.prompts import Prompt, distinct_masks, grid_prompts, prompt_for
from birkhoff.summary import Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import nn

#: The model (``config.json`` and ``model.safetensors``) and ``scenes.npz``.
SAMPLE = Path(__file__).parent / "sample"
#: What the demo imports besides birkhoff.
PACKAGES = ("torch", "transformers", "safetensors", "matplotlib", "PIL")
#: A photograph of the public domain that matplotlib ships.
PHOTO = "grace_hopper.jpg"
#: Masks that are shown of a photo.
PHOTO_MASKS = 6


@dataclass(frozen=True)
class Segmented:
    """A picture and the masks of both models for the same prompts."""

    title: str
    picture: Picture
    prompts: Sequence[Prompt]
    #: Boolean, of shape (prompts, height, width).
    original: Masks
    compressed: Masks
    #: The true masks, of the same shape, if the picture was drawn.
    truth: Masks | None = None

    @property
    def fidelity(self) -> float:
        """Mean IoU of the compressed model's masks with the original's."""
        return float(np.mean(iou(self.compressed, self.original)))


def load_original() -> nn.Module:
    """The small trained SAM with its weights in float32, in eval mode."""
    from safetensors.torch import load_model
    from transformers import SamConfig, SamModel

    model: nn.Module = SamModel(SamConfig.from_pretrained(SAMPLE))
    with tempfile.TemporaryDirectory(prefix="birkhoff-demo-") as folder:
        decoded = Path(folder) / "model.safetensors"
        decompress_file(SAMPLE / "model.safetensors", decoded)
        load_model(model, decoded)
    return model.eval()


def sample_scenes() -> tuple[NDArray[np.uint8], list[Masks]]:
    """Drawn scenes that the model has not been trained on.

    Returns:
        Pictures of shape (scenes, 128, 128, 3), and for each the visible masks of its shapes, of
        shape (shapes, 128, 128).
    """
    with np.load(SAMPLE / "scenes.npz", allow_pickle=False) as arrays:
        images, labels = arrays["images"], arrays["labels"]
    areas = [np.bincount(scene.ravel()) for scene in labels]
    masks = [
        np.stack([scene == k for k in range(1, len(area)) if area[k] >= SMALLEST_SHAPE])
        for scene, area in zip(labels, areas, strict=True)
    ]
    return images, masks


#: Pixels that a shape must show; the model was trained on no smaller ones.
SMALLEST_SHAPE = 48


def run_demo(
    output: Path,
    *,
    bits: int = 4,
    image: Path | None = None,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
) -> tuple[Summary, list[Segmented]]:
    """Compresses the model, segments with it and with the original, and draws both.

    Args:
        output: The picture to write.
        bits: Code bits a weight of the bulk of the model.
        image: A picture to segment besides the scenes; a photo of matplotlib's by default.
        overwrite: Replace the output if it exists.
        say: Told what was done, a line at a time.

    Raises:
        BirkhoffError: A package is missing, or the picture cannot be read.
        OSError: A file cannot be read or written.
    """
    missing = [package for package in PACKAGES if find_spec(package) is None]
    if missing:
        raise BirkhoffError(
            f"the demo takes {', '.join(missing)}; install what it needs with "
            '`pip install "birkhoff[demo]"`'
        )
    check_output(output, overwrite=overwrite)
    photo = read_picture(_photo() if image is None else image)
    original = load_original()
    with tempfile.TemporaryDirectory(prefix="birkhoff-demo-") as folder:
        summary, compressed = _compressed(original, Path(folder), bits)
        models = TransformersPredictor(original), TransformersPredictor(compressed)
        scenes = zip(*sample_scenes(), strict=True)
        segmented = [
            _segment_scene(f"scene {n}", *models, picture, shapes)
            for n, (picture, shapes) in enumerate(scenes, start=1)
        ]
        segmented.append(_segment_photo("photo", *models, photo))
    for one in segmented:
        hit = "" if one.truth is None else f"   IoU with the shapes {_hits(one)}"
        say(f"{one.title:8}  {len(one.prompts)} masks, fidelity {one.fidelity:.4f}{hit}")
    _draw([*segmented[:3], segmented[-1]], output, bits)
    say(f"picture   {output}")
    return summary, segmented


def _hits(one: Segmented) -> str:
    assert one.truth is not None
    before, after = (np.mean(iou(masks, one.truth)) for masks in (one.original, one.compressed))
    return f"{before:.3f} before, {after:.3f} after"


def _photo() -> Path:
    from matplotlib import get_data_path

    return Path(get_data_path()) / "sample_data" / PHOTO


def _compressed(original: Any, folder: Path, bits: int) -> tuple[Summary, nn.Module]:
    """The model by way of two files, as a user would compress it."""
    from safetensors.torch import save_model
    from transformers import SamModel

    from birkhoff.models import load

    source, target = folder / "original.safetensors", folder / "compressed.safetensors"
    save_model(original, str(source))
    summary = compress_file(source, target, bits=bits)
    return summary, load(target, lambda: SamModel(original.config))


def _segment_scene(
    title: str,
    original: TransformersPredictor,
    compressed: TransformersPredictor,
    picture: Picture,
    shapes: Masks,
) -> Segmented:
    """A drawn scene, asked for each of its shapes by a box."""
    rng = np.random.default_rng(0)
    prompts = [prompt_for(shape, "boxes", rng) for shape in shapes]
    masks = [_masks(model, picture, prompts) for model in (original, compressed)]
    return Segmented(title, picture, prompts, masks[0], masks[1], shapes)


def _segment_photo(
    title: str,
    original: TransformersPredictor,
    compressed: TransformersPredictor,
    picture: Picture,
) -> Segmented:
    """A photo, asked for what the original finds by itself with a grid of points."""
    height, width = picture.shape[:2]
    grid = grid_prompts(height, width)
    original.set_image(picture)
    found = list(original.predict_all(grid))
    masks = [prediction.masks[prediction.best] for prediction in found]
    scores = [float(prediction.scores[prediction.best]) for prediction in found]
    prompts = [
        prompt_for(masks[index], "boxes", np.random.default_rng(0))
        for index in distinct_masks(masks, scores)[:PHOTO_MASKS]
    ] or [Prompt(box=(0.0, 0.0, float(width), float(height)))]
    both = [_masks(model, picture, prompts) for model in (original, compressed)]
    return Segmented(title, picture, prompts, both[0], both[1])


def _masks(model: TransformersPredictor, picture: Picture, prompts: Sequence[Prompt]) -> Masks:
    model.set_image(picture)
    return np.stack([answer.masks[answer.best] for answer in model.predict_all(prompts)])


def _draw(rows: Sequence[Segmented], output: Path, bits: int) -> None:
    """A picture with one row for each: prompts, original, compressed, where the masks differ."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), 4, squeeze=False)
    heads = ("prompts", "original", f"compressed, {bits} bits", "difference")
    for head, axis in zip(heads, axes[0], strict=True):
        axis.set_title(head)
    for one, (prompts, original, compressed, difference) in zip(rows, axes, strict=True):
        prompts.imshow(one.picture)
        for number, prompt in enumerate(one.prompts):
            _draw_box(prompts, prompt, number)
        original.imshow(_tinted(one.picture, one.original))
        compressed.imshow(_tinted(one.picture, one.compressed))
        compressed.set_xlabel(f"fidelity {one.fidelity:.4f}")
        difference.imshow((one.original ^ one.compressed).any(0), cmap="gray_r", vmin=0, vmax=1)
        for axis in (prompts, original, compressed, difference):
            axis.set(xticks=[], yticks=[])
    figure.savefig(output, dpi=100)


def _colour(number: int) -> NDArray[np.float32]:
    from matplotlib import colormaps

    return np.array(colormaps["tab10"](number % 10)[:3], dtype=np.float32)


def _draw_box(axis: Axes, prompt: Prompt, number: int) -> None:
    from matplotlib.patches import Rectangle

    assert prompt.box is not None
    left, top, right, bottom = prompt.box
    style: dict[str, Any] = {"fill": False, "edgecolor": _colour(number), "linewidth": 1.5}
    axis.add_patch(Rectangle((left - 0.5, top - 0.5), right - left, bottom - top, **style))


def _tinted(picture: Picture, masks: Masks) -> NDArray[np.float32]:
    """The picture in grey with its masks in colour, from 0 to 1."""
    grey = picture.mean(axis=2, keepdims=True, dtype=np.float32) / 255
    tinted = np.repeat(grey, 3, axis=2)
    for number, mask in enumerate(masks):
        tinted[mask] = 0.35 * tinted[mask] + 0.65 * _colour(number)
    return tinted
