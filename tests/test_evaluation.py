"""Masks of a compressed model against those of its original."""

from __future__ import annotations

import json
import re
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from birkhoff import BirkhoffError
from birkhoff.evaluation import (
    Prediction,
    Prompt,
    PromptKind,
    evaluate,
    read_annotations,
    write_report,
)
from birkhoff.evaluation.annotations import draw
from birkhoff.evaluation.detection import Detections, average_precision
from birkhoff.evaluation.pictures import find_pictures, read_picture
from birkhoff.evaluation.prompts import distinct_masks, grid_prompts, prompt_for
from conftest import Run
from test_transformers import sam_config

transformers = pytest.importorskip("transformers")

Masks = NDArray[np.bool_]

#: Top, left and size of the square in each picture.
SQUARES = {"a.png": (10, 20, 30), "folder/b & <b>.png": (5, 5, 40)}
HEIGHT, WIDTH = 64, 80


def square(top: int, left: int, size: int) -> Masks:
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.bool_)
    mask[top : top + size, left : left + size] = True
    return mask


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder with pictures of a white square on black, and a file that is no picture."""
    folder = tmp_path / "pictures"
    for name, where in SQUARES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.where(square(*where)[..., None], np.uint8(255), np.zeros(3, np.uint8))
        Image.fromarray(pixels).save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    return folder


@pytest.fixture
def coco_file(tmp_path: Path) -> Path:
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(coco()))
    return path


def coco() -> dict[str, Any]:
    """The squares: one as a polygon, the other as run lengths, and a crowd."""
    (top, left, size), other = SQUARES.values()
    corners = [left, top, left + size, top, left + size, top + size, left, top + size]
    names = list(SQUARES)
    return {
        "images": [
            {"id": 7 + i, "file_name": name, "height": HEIGHT, "width": WIDTH}
            for i, name in enumerate(names)
        ],
        "annotations": [
            {"image_id": 7, "segmentation": [corners], "iscrowd": 0},
            {"image_id": 8, "segmentation": run_lengths(square(*other))},
            {"image_id": 8, "segmentation": run_lengths(square(0, 0, 64)), "iscrowd": 1},
        ],
    }


def run_lengths(mask: Masks) -> dict[str, Any]:
    values = np.concatenate([[False], mask.T.ravel()])
    edges = np.flatnonzero(values[1:] != values[:-1])
    counts = np.diff(np.concatenate([[0], edges, [mask.size]]))
    return {"size": list(mask.shape), "counts": counts.tolist()}


class Threshold:
    """A predictor that finds what is bright, as those of the original packages answer.

    ``lost`` columns on the left of it are missed, and ``shuffled`` masks are in another order.
    """

    def __init__(self, lost: int = 0, *, shuffled: bool = False, masks: int = 3) -> None:
        self.lost = lost
        self.order = [1, 0, 2][:masks] if shuffled else [0, 1, 2][:masks]
        self.asked: list[Any] = []

    def set_image(self, image: NDArray[np.uint8]) -> None:
        assert image.dtype == np.uint8
        self.bright = image[..., 0] > 128

    def predict(
        self,
        point_coords: NDArray[np.float32] | None = None,
        point_labels: NDArray[np.int64] | None = None,
        box: NDArray[np.float32] | None = None,
        multimask_output: bool = True,
    ) -> tuple[Masks, NDArray[np.float32], None]:
        self.asked.append((point_coords, box))
        assert (point_coords is None) != (box is None)
        assert multimask_output == (box is None)
        mask = self.bright.copy()
        left = np.flatnonzero(mask.any(0))[0]
        mask[:, left : left + self.lost] = False
        scores = np.array([0.9, 0.5, 0.1], np.float32)
        several = np.stack([mask, ~mask, np.zeros_like(mask)])
        if box is not None:
            return several[:1], scores[:1], None
        return several[self.order], scores[: len(self.order)], None


def test_the_same_model_keeps_all(pictures: Path) -> None:
    counts: dict[PromptKind, int] = {"points": 2, "boxes": 2, "grid": 128}
    for prompts, count in counts.items():
        evaluation = evaluate(Threshold(), Threshold(), pictures, prompts=prompts)
        assert len(evaluation.comparisons) == count
        assert evaluation.mean_iou == evaluation.worst_iou == evaluation.mean_boundary_f == 1
        assert evaluation.best_changed_share == evaluation.mean_score_difference == 0
        assert evaluation.layer_sqnr == {}
        assert evaluation.ground_truth is None


def test_what_is_lost_is_counted(pictures: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    evaluation = evaluate(
        Threshold(lost=3), Threshold(), pictures, progress=lambda *what: seen.append(what)
    )
    assert seen == [("a.png", 1, 2), ("b & <b>.png", 2, 2)]
    assert [c.iou for c in evaluation.comparisons] == pytest.approx([27 / 30, 37 / 40])
    assert evaluation.mean_iou == pytest.approx((27 / 30 + 37 / 40) / 2)
    assert evaluation.worst_iou == pytest.approx(27 / 30)
    assert [example.comparison.iou for example in evaluation.worst] == pytest.approx([0.9, 0.925])
    assert 0 < evaluation.mean_boundary_f < 1
    figures = evaluation.to_json()
    assert json.loads(json.dumps(figures, allow_nan=False)) == json.loads(json.dumps(figures))
    assert figures["prompt_results"][0]["iou"] == pytest.approx(0.9)


def test_another_mask_is_best(pictures: Path) -> None:
    evaluation = evaluate(Threshold(shuffled=True), Threshold(), pictures)
    assert evaluation.best_changed_share == 0
    assert evaluation.mean_iou == 0  # what was the best is now the second

    class Reversed(Threshold):
        def predict(self, **options: Any) -> Any:  # type: ignore[override]
            masks, scores, rest = super().predict(**options)
            return masks, scores[::-1].copy(), rest

    evaluation = evaluate(Reversed(), Threshold(), pictures)
    assert evaluation.best_changed_share == 1
    assert evaluation.mean_iou == 0
    assert evaluation.mean_same_mask_iou == 1
    assert evaluation.mean_score_difference == pytest.approx(0.8)


def test_prompts_come_from_the_original(pictures: Path) -> None:
    original, compressed = Threshold(), Threshold(lost=10)
    evaluation = evaluate(compressed, original, pictures, prompts="boxes")
    (top, left, size), _ = SQUARES.values()
    assert evaluation.comparisons[0].prompt.box == (left, top, left + size, top + size)
    np.testing.assert_array_equal(compressed.asked[0][1], [left, top, left + size, top + size])
    points = [c.prompt.point for c in evaluate(Threshold(), Threshold(), pictures).comparisons]
    again = [c.prompt.point for c in evaluate(Threshold(), Threshold(), pictures).comparisons]
    other = evaluate(Threshold(), Threshold(), pictures, seed=1).comparisons
    assert points == again != [c.prompt.point for c in other]
    for point, where in zip(points, SQUARES.values(), strict=True):
        assert point is not None
        assert square(*where)[int(point[1]), int(point[0])]


def test_annotations_measure_both(pictures: Path, coco_file: Path) -> None:
    for prompts in get_args(PromptKind):
        evaluation = evaluate(
            Threshold(lost=10),
            Threshold(),
            pictures,
            prompts=prompts,
            annotations=coco_file,
        )
        truth = evaluation.ground_truth
        assert truth is not None
        assert truth.objects == 2
        assert truth.original_miou == pytest.approx(1, abs=0.04)  # a polygon has its own edge
        assert truth.compressed_miou == pytest.approx((20 / 30 + 30 / 40) / 2, abs=0.04)
        assert truth.original_ap > 0.9
        # Found at thresholds up to .65 and .75 of ten, with equal scores.
        assert 0.3 < truth.compressed_ap < 0.6


def test_average_precision_by_hand() -> None:
    # Two objects; the best detection finds one, the second nothing, the third the other.
    ious = np.array([[0.92, 0.0], [0.1, 0.2], [0.0, 0.92]])
    detections = Detections(np.array([0.9, 0.8, 0.7]), ious)
    # Up to recall .5 (51 of 101 points) precision is 1, then 2/3; the threshold .95 finds nothing.
    assert average_precision([detections]) == pytest.approx(0.9 * (51 + 50 * 2 / 3) / 101)
    # A second detection of the same object is false.
    doubled = Detections(np.array([0.9, 0.8]), np.array([[1.0], [1.0]]))
    assert average_precision([doubled]) == 1
    wrong_first = Detections(np.array([0.9, 0.8]), np.array([[0.0], [1.0]]))
    assert average_precision([wrong_first]) == pytest.approx(0.5)
    assert average_precision([Detections(np.empty(0), np.empty((0, 3)))]) == 0
    assert np.isnan(average_precision([]))


def test_segmentations() -> None:
    mask = square(10, 20, 30)
    assert (draw(run_lengths(mask), HEIGHT, WIDTH) == mask).all()
    polygons = [[20, 10, 50, 10, 50, 40, 20, 40]]
    assert (draw(polygons, HEIGHT, WIDTH) != mask).sum() <= 2 * 31
    # Packed as COCO's tools do: 30 and 49 take two groups of bits, and from the fourth on the
    # difference to the last but one is there: 0 for 30, -1 for 9.
    for packed, runs in (("1n0a1", [1, 30, 49]), ("1n0:0O", [1, 30, 10, 30, 9])):
        expected = draw({"size": [4, 20], "counts": runs}, 4, 20)
        assert (draw({"size": [4, 20], "counts": packed}, 4, 20) == expected).all()


@pytest.mark.parametrize(
    "segmentation",
    [
        "polygon",
        [[1, 2, 3, 4]],
        [[1, 2, 3, 4, 5]],
        [[0, 0, 1e300, 0, 0, 1e300]],
        [[0, 0, float("nan"), 0, 0, 9]],
        {"size": [4, 4], "counts": [3]},
        {"size": [4, 4], "counts": [3, -3, 16]},
        {"size": [4, 5], "counts": [16]},
        {"size": [4, 4], "counts": "~~~~"},
        {"size": [4, 4], "counts": "ooooooooooooooooooooo"},
        {"counts": [16]},
    ],
    ids=str,
)
def test_malformed_segmentations(segmentation: Any) -> None:
    with pytest.raises((ValueError, KeyError)):
        draw(segmentation, 4, 4)


def test_prompts() -> None:
    prompts = grid_prompts(40, 80, side=2)
    assert [prompt.point for prompt in prompts] == [(20, 10), (60, 10), (20, 30), (60, 30)]
    rng = np.random.default_rng(0)
    assert prompt_for(square(3, 5, 1), "boxes", rng) == Prompt(box=(5, 3, 6, 4))
    assert prompt_for(square(3, 5, 1), "points", rng) == Prompt(point=(5.5, 3.5))
    masks = [square(0, 0, 20), square(0, 1, 20), square(30, 30, 20), square(0, 0, 0)]
    assert distinct_masks(masks, [0.5, 0.9, 0.7, 1.0]) == [1, 2]


def test_pictures_are_upright(tmp_path: Path) -> None:
    path = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.new("L", (30, 20)).save(path, exif=exif)
    assert read_picture(path).shape == (30, 20, 3)


class Page(HTMLParser):
    """Collects what a page refers to and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href", "data")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_report_needs_nothing_else(pictures: Path, tmp_path: Path) -> None:
    evaluation = evaluate(Threshold(lost=3), Threshold(), pictures)
    path = tmp_path / "report.html"
    write_report(path, evaluation, compressed="<script>alert(1)</script>", original="a & b")
    content = path.read_text(encoding="utf-8")
    page = Page()
    page.feed(content)
    assert "script" not in page.tags
    assert page.tags.count("img") == 4 * 2
    assert page.tags.count("svg") == 1
    assert page.tags.count("b") == 0
    assert all(re.match(r"data:image/png;base64,|#", source) for source in page.sources)
    assert "url(http" not in content
    # The worst comes first.
    assert page.text.index("a.png") < page.text.index("b & <b>.png")
    assert "0.9000" in page.text
    with pytest.raises(FileExistsError, match="--force"):
        write_report(path, evaluation)
    write_report(path, evaluation, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()].count("report.html") == 1
    assert not list(tmp_path.glob(".*.tmp"))


def test_the_report_does_not_change_by_itself(pictures: Path, tmp_path: Path) -> None:
    for name in ("first.html", "second.html"):
        write_report(tmp_path / name, evaluate(Threshold(3), Threshold(), pictures))
    assert (tmp_path / "first.html").read_bytes() == (tmp_path / "second.html").read_bytes()


def test_bad_pictures(tmp_path: Path, pictures: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(BirkhoffError, match="no pictures"):
        evaluate(Threshold(), Threshold(), tmp_path / "empty")
    with pytest.raises(FileNotFoundError):
        evaluate(Threshold(), Threshold(), tmp_path / "missing")
    with pytest.raises(BirkhoffError, match="empty"):
        find_pictures([])
    broken = pictures / "a.png"
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(BirkhoffError, match=r"a\.png"):
        evaluate(Threshold(), Threshold(), pictures)


def test_bad_annotations(tmp_path: Path, pictures: Path, coco_file: Path) -> None:
    def evaluated(**changes: Any) -> None:
        path = tmp_path / "changed.json"
        path.write_text(json.dumps({**coco(), **changes}))
        evaluate(Threshold(), Threshold(), pictures, annotations=path)

    evaluated()
    others = [{"id": i, "file_name": f"{i}.jpg", "height": 9, "width": 9} for i in (7, 8)]
    with pytest.raises(BirkhoffError, match="none of the 2 pictures"):
        evaluated(images=others)
    resized = [{**image, "width": 90} for image in coco()["images"]]
    with pytest.raises(BirkhoffError, match="90 x 64"):
        evaluated(images=resized)
    with pytest.raises(BirkhoffError, match="malformed"):
        evaluated(annotations=[{"image_id": 7, "segmentation": [[1, 2]]}])
    with pytest.raises(BirkhoffError, match="no picture has an annotated object"):
        evaluated(annotations=[])
    for content in ("", "[]", "{}", '{"images": [{}], "annotations": []}', "\x00"):
        coco_file.write_text(content)
        with pytest.raises(BirkhoffError, match="format of COCO"):
            read_annotations(coco_file)


def test_missing_packages(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluation = evaluate(Threshold(), Threshold(), pictures)
    uses: dict[str, Callable[[], Any]] = {
        "PIL": lambda: evaluate(Threshold(), Threshold(), pictures),
        "scipy.spatial": lambda: evaluate(Threshold(), Threshold(), pictures),
        "matplotlib": lambda: write_report(tmp_path / "report.html", evaluation),
    }
    for package, use in uses.items():
        with monkeypatch.context() as missing:
            missing.setitem(sys.modules, package, None)
            with pytest.raises(BirkhoffError, match=r"birkhoff\[eval\]"):
                use()


def test_models_that_do_not_belong_together(pictures: Path) -> None:
    with pytest.raises(BirkhoffError, match="belong together"):
        evaluate(Threshold(masks=2), Threshold(), pictures)
    with pytest.raises(TypeError, match="no model that segments"):
        evaluate(object(), Threshold(), pictures)
    with pytest.raises(ValueError, match="'grid'"):
        evaluate(Threshold(), Threshold(), pictures, prompts="lines")  # type: ignore[arg-type]

    class Blind(Threshold):
        def predict(self, **options: Any) -> Any:  # type: ignore[override]
            masks, scores, rest = super().predict(**options)
            return np.zeros_like(masks), scores, rest

    with pytest.raises(BirkhoffError, match="found nothing"):
        evaluate(Threshold(), Blind(), pictures)


def test_a_predictor_of_ones_own(pictures: Path) -> None:
    class Constant:
        def set_image(self, image: NDArray[np.uint8]) -> None:
            self.shape = image.shape[:2]

        def predict_all(self, prompts: Sequence[Prompt]) -> Iterator[Prediction]:
            for prompt in prompts:
                masks = np.zeros((1, *self.shape), dtype=np.bool_)
                assert prompt.point is not None
                masks[0, : int(prompt.point[1])] = True
                yield Prediction(masks, np.array([1.0]))

    assert evaluate(Constant(), Constant(), pictures, prompts="grid").mean_iou == 1


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small SAM with random weights."""
    import torch

    torch.manual_seed(5)
    model = transformers.SamModel(sam_config()).eval()
    model.save_pretrained(tmp_path / "original")
    return tmp_path / "original"


@pytest.mark.filterwarnings("ignore")
def test_transformers_models(pictures: Path, folder: Path) -> None:
    import torch

    import birkhoff
    from birkhoff.architectures import load_folder
    from birkhoff.evaluation.predictors import TransformersPredictor

    original: Any = load_folder(folder)
    compressed = birkhoff.compress(load_folder(folder), bits=3)
    for prompts in get_args(PromptKind):
        same = evaluate(original, load_folder(folder), pictures, prompts=prompts)
        assert same.mean_iou == 1
    evaluation = evaluate(compressed, original, pictures, prompts="grid")
    assert 0.3 < evaluation.mean_iou < 1
    qkv = evaluation.layer_sqnr["vision_encoder.layers.0.attn.qkv.weight"]
    assert 16 < qkv < 18
    assert all(mask.shape == (HEIGHT, WIDTH) for mask in [evaluation.worst[0].original])

    # The masks are those that the model's own post-processing gives.
    predictor = TransformersPredictor(original)
    picture = read_picture(pictures / "a.png")
    predictor.set_image(picture)
    prediction = next(predictor.predict_all([Prompt(point=(40.0, 32.0))]))
    side = original.config.vision_config.image_size
    with torch.inference_mode():
        output = original(
            pixel_values=predictor.pixel_values(picture),
            input_points=torch.tensor([[[[40.0 * 64 / 80, 32.0 * 51 / 64]]]]),
        )
        processor = transformers.SamImageProcessor(pad_size={"height": side, "width": side})
        expected = processor.post_process_masks(
            output.pred_masks, [[HEIGHT, WIDTH]], [[51, 64]], pad_size={"height": 64, "width": 64}
        )
    np.testing.assert_array_equal(prediction.masks, np.asarray(expected[0][0]))
    np.testing.assert_allclose(prediction.scores, output.iou_scores[0, 0], rtol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_models_of_another_shape(pictures: Path, folder: Path) -> None:
    import birkhoff
    from birkhoff.architectures import load_folder

    config = sam_config()
    config.vision_config.mlp_dim = 256
    other = birkhoff.compress(transformers.SamModel(config).eval())
    with pytest.raises(BirkhoffError, match=r"not made from this original.*mlp"):
        evaluate(other, load_folder(folder), pictures)


def test_command_line(
    birkhoff: Run, run_json: Callable[..., Any], pictures: Path, folder: Path, tmp_path: Path
) -> None:
    compressed, report = tmp_path / "compressed.safetensors", tmp_path / "report.html"
    assert birkhoff("compress", folder, "-o", compressed).returncode == 0
    options = ["--against", folder, "--images", pictures]
    result = run_json("eval", compressed, *options, "--prompts", "grid", "--report", report)
    assert result["comparisons"] == 128
    assert 0.5 < result["mean_iou"] <= 1
    assert len(result["layer_sqnr_db"]) > 20
    assert "original" in report.read_text()


def test_command_line_refuses(
    birkhoff: Run, refused: Callable[..., str], pictures: Path, folder: Path, tmp_path: Path
) -> None:
    compressed = tmp_path / "compressed.safetensors"
    assert birkhoff("compress", folder, "-o", compressed).returncode == 0
    (tmp_path / "empty").mkdir()
    options = ["eval", compressed, "--against", folder, "--images"]
    assert "no pictures" in refused(*options, tmp_path / "empty")
    report = tmp_path / "report.html"
    report.write_text("mine")
    assert "--force" in refused(*options, pictures, "--report", report)
    assert report.read_text() == "mine"
    assert "mine" not in refused(*options, pictures, "--prompts", "lines", code=2)
    bare = folder / "model.safetensors"
    message = refused("eval", compressed, "--against", bare, "--images", pictures)
    assert "--architecture" in message
    named = ["--against", bare, "--architecture"]
    unknown = refused("eval", compressed, *named, "vit_x", "--images", pictures)
    assert "vit_x" in unknown
    (folder / "config.json").unlink()
    assert "config.json" in refused(*options, pictures)


def test_bare_checkpoints(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints of the original package are known by their shapes."""
    import torch
    from torch import nn

    import birkhoff
    from birkhoff.architectures import load_pair

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch_embed = nn.Module()
            self.patch_embed.proj = nn.Linear(256, 768)

    class Sam(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.image_encoder = Encoder()
            self.prompt_encoder = nn.Linear(4, 4)
            self.mask_decoder = nn.Linear(4, 4)

    class Module(types.ModuleType):
        sam_model_registry = {"vit_b": Sam, "vit_h": Sam}  # noqa: RUF012

        @staticmethod
        def SamPredictor(model: nn.Module) -> Threshold:
            predictor = Threshold()
            vars(predictor)["model"] = model
            return predictor

    original, compressed = tmp_path / "sam.pth", tmp_path / "sam.safetensors"
    torch.save(Sam().state_dict(), original)
    birkhoff.compress_file(original, compressed)
    monkeypatch.setitem(sys.modules, "segment_anything", None)
    with pytest.raises(BirkhoffError, match=r"segment_anything.*not installed"):
        load_pair(compressed, original)
    monkeypatch.setitem(sys.modules, "segment_anything", Module("segment_anything"))
    evaluation = evaluate(*load_pair(compressed, original), pictures)
    assert evaluation.mean_iou == 1
    assert list(evaluation.layer_sqnr) == ["image_encoder.patch_embed.proj.weight"]
    torch.save({"image_encoder.patch_embed.proj.bias": torch.ones(1280)}, original)
    with pytest.raises(BirkhoffError, match="does not fit Sam"):
        load_pair(compressed, original)
