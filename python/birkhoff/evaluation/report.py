"""One HTML file that shows an evaluation, the worst masks first."""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from birkhoff._core import BirkhoffError
from birkhoff.compression import check_output
from birkhoff.evaluation.fidelity import Comparison, Evaluation, Example
from birkhoff.evaluation.figures import figures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Colours, chosen to differ for colour-blind people too.
ORIGINAL, COMPRESSED = (0, 114, 178), (230, 159, 0)

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1100px; padding: 0 1rem;
  color: #222; background: #fff; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; }
td, th { padding: .2rem .9rem .2rem 0; text-align: left; font-weight: normal; }
td { font-variant-numeric: tabular-nums; }
figure { margin: 0 0 1.6rem; } figcaption { margin-bottom: .3rem; }
.row { display: grid; grid-template-columns: repeat(4, 1fr); gap: .5rem; }
.row img { width: 100%; display: block; } .row span { font-size: .85rem; color: #666; }
svg { max-width: 100%; height: auto; }
.original { color: rgb(0, 114, 178); } .compressed { color: rgb(190, 125, 0); }
"""


def write_report(
    path: str | Path,
    evaluation: Evaluation,
    *,
    compressed: str = "compressed model",
    original: str = "original",
    overwrite: bool = False,
) -> None:
    """Writes an evaluation as one HTML file that needs nothing else.

    Args:
        path: The file to write; it is there as a whole or not at all.
        evaluation: What to show.
        compressed: What the compressed model is called.
        original: What the original is called.
        overwrite: Replace the file if it exists.

    Raises:
        BirkhoffError: Pillow or matplotlib is not installed.
        OSError: The file exists or cannot be written.
    """
    path = Path(path)
    check_output(path, overwrite=overwrite)
    page = render(evaluation, compressed=compressed, original=original)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        unfinished.write_text(page, encoding="utf-8")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def render(evaluation: Evaluation, *, compressed: str, original: str) -> str:
    """The report as HTML.

    Raises:
        BirkhoffError: Pillow or matplotlib is not installed.
    """
    check_installed()
    parts = [
        f"<p>{escape(compressed)}, against {escape(original)}.</p>",
        _table(figures(evaluation)),
        "<h2>Intersection over union, by prompt</h2>",
        _histogram([comparison.iou for comparison in evaluation.comparisons]),
    ]
    if evaluation.layer_sqnr:
        parts += ["<h2>Signal to quantization noise, by tensor</h2>"]
        parts += [_sqnr_plot(evaluation.layer_sqnr), _worst_layers(evaluation.layer_sqnr)]
    if evaluation.worst:
        parts.append(f"<h2>The {len(evaluation.worst)} prompts with the lowest IoU</h2>")
        parts += [_example(example) for example in evaluation.worst]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>Masks of {escape(compressed)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        "<h1>Are the masks still the same?</h1>\n" + "\n".join(parts) + "\n</body>\n</html>\n"
    )


def check_installed() -> None:
    """Raises BirkhoffError if what a report takes is not installed."""
    try:
        import matplotlib  # noqa: F401
        import PIL  # noqa: F401
    except ModuleNotFoundError as error:
        raise BirkhoffError(
            'a report takes Pillow and matplotlib; install them with `pip install "birkhoff[eval]"`'
        ) from error


def _table(rows: Sequence[tuple[str, str]]) -> str:
    cells = (f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows)
    return f"<table>{''.join(cells)}</table>"


def _histogram(ious: Sequence[float]) -> str:
    figure = _new_figure()
    axes = figure.subplots()
    lowest = math.floor(min(*ious, 0.95) * 20) / 20
    axes.hist(ious, bins=np.linspace(lowest, 1, 41).tolist(), color=_hex(ORIGINAL))
    axes.set_xlabel("IoU between the two masks")
    axes.set_ylabel("prompts")
    axes.set_xlim(lowest, 1)
    return _svg(figure, "histogram")


def _sqnr_plot(ratios: dict[str, float]) -> str:
    figure = _new_figure()
    axes = figure.subplots()
    finite = [(i, ratio) for i, ratio in enumerate(ratios.values()) if math.isfinite(ratio)]
    axes.plot([i for i, _ in finite], [ratio for _, ratio in finite], "o", color=_hex(COMPRESSED))
    axes.set_xlabel("coded tensor, in the order of the model")
    axes.set_ylabel("SQNR, dB")
    axes.grid(axis="y", color="#ddd")
    return _svg(figure, "sqnr")


def _worst_layers(ratios: dict[str, float]) -> str:
    worst = sorted(ratios.items(), key=lambda item: item[1])[:10]
    return "<p>The lowest:</p>" + _table([(name, f"{ratio:.2f} dB") for name, ratio in worst])


def _new_figure() -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.8), layout="constrained")
    return figure


def _svg(figure: Figure, name: str) -> str:
    from matplotlib import rc_context

    buffer = io.StringIO()
    # No date, no creator, no random names: the same evaluation gives the same file.
    nothing: dict[str, Any] = {"Date": None, "Creator": None, "Format": None, "Type": None}
    with rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata=nothing)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _example(example: Example) -> str:
    comparison = example.comparison
    panels = [
        ("picture and prompt", _with_prompt(example)),
        ("original", _tinted(example.picture, example.original, ORIGINAL)),
        ("compressed", _tinted(example.picture, example.compressed, COMPRESSED)),
        ("difference", _difference(example)),
    ]
    cells = (f"<div>{_image(pixels, title)}<span>{title}</span></div>" for title, pixels in panels)
    return (
        f"<figure><figcaption>{escape(comparison.picture.name)}, {_describe(comparison)}: "
        f"IoU {comparison.iou:.4f}, boundary F {comparison.boundary_f:.4f}, predicted IoU "
        f"{comparison.original_score:.3f} and {comparison.compressed_score:.3f}"
        + (", another mask is best" if comparison.best_changed else "")
        + f'</figcaption><div class="row">{"".join(cells)}</div></figure>'
    )


def _describe(comparison: Comparison) -> str:
    prompt = comparison.prompt
    if prompt.point is not None:
        return "point " + ", ".join(f"{value:.0f}" for value in prompt.point)
    return "box " + ", ".join(f"{value:.0f}" for value in prompt.box or ())


def _with_prompt(example: Example) -> NDArray[np.uint8]:
    from PIL import Image, ImageDraw

    image = Image.fromarray(example.picture)
    draw = ImageDraw.Draw(image)
    prompt, scale = example.comparison.prompt, example.scale
    width = max(1, round(max(image.size) / 120))
    if prompt.point is not None:
        x, y = (value * scale for value in prompt.point)
        radius = 2 * width
        disc = (x - radius, y - radius, x + radius, y + radius)
        draw.ellipse(disc, fill=(220, 20, 60), outline=(255, 255, 255), width=max(1, width // 2))
    else:
        corners = [value * scale for value in prompt.box or ()]
        draw.rectangle(corners, outline=(220, 20, 60), width=width)
    return np.asarray(image)


def _tinted(
    picture: NDArray[np.uint8], mask: NDArray[np.bool_], colour: tuple[int, int, int]
) -> NDArray[np.uint8]:
    """The picture with a mask in colour over it."""
    tinted = 0.45 * picture + 0.55 * np.array(colour)
    return np.where(mask[..., None], tinted, 0.7 * picture + 0.3 * 255).astype(np.uint8)


def _difference(example: Example) -> NDArray[np.uint8]:
    """Grey where both have the mask; in the colour of the one that has it alone."""
    canvas = np.full(example.picture.shape, 255, dtype=np.uint8)
    canvas[example.original & example.compressed] = 200
    canvas[example.original & ~example.compressed] = ORIGINAL
    canvas[~example.original & example.compressed] = COMPRESSED
    return canvas


def _image(pixels: NDArray[np.uint8], title: str) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="png", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f'<img alt="{escape(title)}" src="data:image/png;base64,{data}">'


def _hex(colour: tuple[int, int, int]) -> str:
    return "#" + bytes(colour).hex()
