"""The small trained model that ships with birkhoff, and the demo that segments with it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from birkhoff import BirkhoffError
from birkhoff.demo import SAMPLE, SMALLEST_SHAPE, Segmented, run_demo, sample_scenes
from birkhoff.evaluation import iou
from conftest import Run

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, list[Segmented], list[str]]:
    """The picture, the summary, what was segmented and what was said."""
    picture = tmp_path_factory.mktemp("demo") / "picture.png"
    lines: list[str] = []
    summary, segmented = run_demo(picture, say=lines.append)
    return picture, summary, segmented, lines


Demo = tuple[Path, Any, list[Segmented], list[str]]


def test_the_sample_is_small() -> None:
    assert sum(path.stat().st_size for path in SAMPLE.iterdir()) < 5_000_000


def test_scenes_show_what_their_masks_say() -> None:
    images, shapes = sample_scenes()
    assert len(images) == len(shapes) == 8
    for image, masks in zip(images, shapes, strict=True):
        assert masks.shape[1:] == image.shape[:2] == (128, 128)
        assert masks.sum((1, 2)).min() >= SMALLEST_SHAPE
        assert masks.sum(0).max() == 1  # no pixel shows two shapes


def test_the_model_segments_scenes_that_it_has_not_seen(demo: Demo) -> None:
    _, _, segmented, _ = demo
    hits = [iou(one.original, one.truth) for one in segmented if one.truth is not None]
    assert len(hits) == 8
    assert np.mean(np.concatenate(hits)) > 0.8
    assert np.median(np.concatenate(hits)) > 0.88


def test_four_bits_keep_the_masks(demo: Demo) -> None:
    _, summary, segmented, _ = demo
    assert summary.ratio > 5.5
    scenes = [one for one in segmented if one.truth is not None]
    fidelity = np.concatenate([iou(one.compressed, one.original) for one in scenes])
    assert np.mean(fidelity) > 0.985
    before, after = (
        np.mean(
            np.concatenate([iou(masks, one.truth) for one, masks in pairs if one.truth is not None])
        )
        for pairs in (
            [(one, one.original) for one in scenes],
            [(one, one.compressed) for one in scenes],
        )
    )
    assert abs(before - after) < 0.01
    # They are not the same masks: it is the compressed model that was asked.
    assert np.mean(fidelity) < 1


def test_a_photo_is_segmented_too(demo: Demo) -> None:
    _, _, segmented, _ = demo
    photo = segmented[-1]
    assert photo.truth is None
    assert photo.original.shape[1:] == photo.picture.shape[:2]
    assert photo.fidelity > 0.9


def test_the_demo_draws_and_tells(demo: Demo) -> None:
    picture, _, _, lines = demo
    from PIL import Image

    with Image.open(picture) as image:
        assert image.width > 1000
    assert len(lines) == 10
    assert all("fidelity" in line for line in lines[:9])
    assert str(picture) in lines[-1]


def test_the_command(birkhoff: Run, tmp_path: Path) -> None:
    from PIL import Image

    image, output = tmp_path / "own.png", tmp_path / "masks.png"
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)
    Image.fromarray(pixels).save(image)
    done = birkhoff("demo", "--bits", "5", "--image", image, "--output", output)
    assert done.returncode == 0, done.stderr
    assert "coded, 5 bits" in done.stdout
    assert output.is_file()
    again = birkhoff("demo", "--output", output)
    assert again.returncode == 1
    assert "--force" in again.stderr


def test_a_missing_picture(birkhoff: Run, tmp_path: Path) -> None:
    missing = tmp_path / "nowhere.png"
    done = birkhoff("demo", "--image", missing, "--output", tmp_path / "masks.png")
    assert done.returncode == 1
    assert "nowhere.png" in done.stderr
    assert not (tmp_path / "masks.png").exists()


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "birkhoff.demo.find_spec", lambda name: None if name == "matplotlib" else find(name)
    )
    with pytest.raises(BirkhoffError, match=r'matplotlib.*pip install "birkhoff\[demo\]"'):
        run_demo(tmp_path / "picture.png")
