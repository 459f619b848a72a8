"""Tables and progress bars for the terminal."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from birkhoff import compression
from birkhoff.policy import SIXTEEN
from birkhoff.summary import Summary, TensorSummary

if TYPE_CHECKING:
    from birkhoff.evaluation import Evaluation


def console() -> Console:
    """Standard output; not wrapped where it is no terminal."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 160)


@contextmanager
def progress_bar(what: str) -> Iterator[compression.Progress]:
    """A bar on standard error, if that is a terminal; else nothing is shown."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("[dim]{task.fields[name]}"),
    )
    stderr = Console(stderr=True)
    with Progress(
        *columns, console=stderr, transient=True, disable=not sys.stderr.isatty()
    ) as progress:
        task = progress.add_task(what, total=None, name="")

        def update(name: str, done: int, total: int) -> None:
            progress.update(task, completed=done, total=total, name=escape(name))

        yield update


def show_summary(out: Console, summary: Summary) -> None:
    """What was compressed, by kind of tensor, and the policy that was followed."""
    out.print(_kinds_table(summary))
    seconds = "" if summary.seconds is None else f", in {summary.seconds:.2f} s"
    out.print(
        f"{summary.original_nbytes:,} bytes of tensors -> a file of {summary.nbytes:,} bytes: "
        f"[bold]{summary.ratio:.2f}x[/] smaller{seconds}",
        soft_wrap=True,
    )
    if not math.isnan(summary.bits_per_weight):
        out.print(
            f"{summary.bits_per_weight:.3f} bits a coded weight, scales and padding counted",
            soft_wrap=True,
        )
    worst = summary.worst
    if summary.sqnr is not None:
        text = f"SQNR {decibels(summary.sqnr)} over all"
        if worst is not None:
            text += f", worst {decibels(worst.sqnr)} in {escape(worst.name)}"
        out.print(text, soft_wrap=True)
    _show_policy(out, summary)
    for note in summary.notes:
        out.print(f"note: {escape(note)}", soft_wrap=True)


def _kinds_table(summary: Summary) -> Table:
    table = _table("tensors", "count", "weights", "bytes before", "bytes after", "bits/weight")
    measured = any(tensor.sqnr is not None for tensor in summary.tensors)
    if measured:
        table.add_column("worst SQNR", justify="right")
    kinds: dict[tuple[str, str], list[TensorSummary]] = {}
    for tensor in summary.tensors:
        kinds.setdefault((tensor.coding, tensor.kind), []).append(tensor)
    for (coding, kind), tensors in sorted(kinds.items()):
        row = _kind_row(kind if coding == "tied" else f"{coding}, {kind}", tensors)
        table.add_row(*row, *([_worst(tensors)] if measured else []))
    table.add_section()
    row = _kind_row("all", summary.tensors)
    table.add_row(*row, *([_worst(summary.tensors)] if measured else []), style="bold")
    return table


def _kind_row(what: str, tensors: list[TensorSummary]) -> list[str]:
    elements = sum(tensor.elements for tensor in tensors if tensor.coding != "tied")
    nbytes = sum(tensor.nbytes for tensor in tensors)
    return [
        what,
        f"{len(tensors):,}",
        f"{elements:,}",
        f"{sum(tensor.original_nbytes for tensor in tensors):,}",
        f"{nbytes:,}",
        f"{8 * nbytes / elements:.3f}" if elements else "-",
    ]


def _worst(tensors: list[TensorSummary]) -> str:
    measured = [tensor.sqnr for tensor in tensors if tensor.sqnr is not None]
    return decibels(min(measured, default=None))


def _show_policy(out: Console, summary: Summary) -> None:
    settings = summary.settings
    if "rules" not in settings:
        return
    if settings.get("feedback"):
        out.print("error feedback: codes chosen for the outputs of layers on synthetic inputs")
    if "allocation" in settings:
        _show_allocation(out, summary)
        return
    out.print(
        f"policy: {escape(str(settings.get('model')))} model, {settings.get('bits')} bits, codec "
        f"{escape(str(settings.get('codec')))}; the last rule that matches a name decides",
        soft_wrap=True,
    )
    for pattern, bits in settings["rules"]:
        what = "kept in 16 bit" if bits == SIXTEEN else f"{bits} bits"
        out.print(f"  {escape(str(pattern)):<40} {what}", soft_wrap=True)
    for pattern in settings.get("skip", []):
        out.print(f"  {escape(str(pattern)):<40} unchanged", soft_wrap=True)


def _show_allocation(out: Console, summary: Summary) -> None:
    """What the bits were chosen for, and what the parts of the model got."""
    allocation = summary.settings["allocation"]
    if "sqnr_db" in allocation:
        what = f"the fewest bits that reach {allocation['sqnr_db']:g} dB"
    else:
        ratio = allocation.get("ratio")
        size = "of the policy's size" if ratio is None else f"{ratio:g} times smaller"
        what = f"the least error in a file {size}, errors {allocation.get('errors')}"
    out.print(f"allocation: {escape(what)}", soft_wrap=True)
    parts: dict[str, list[TensorSummary]] = {}
    for tensor in summary.tensors:
        if len(tensor.shape) > 1 and tensor.coding != "tied":
            parts.setdefault(re.sub(r"\d+", "*", tensor.name), []).append(tensor)
    table = _table("part", "tensors", "weights", "bits", "mean")
    for part, tensors in parts.items():
        bits = [tensor.bits or SIXTEEN for tensor in tensors]
        elements = sum(tensor.elements for tensor in tensors)
        mean = sum(
            rate * tensor.elements for rate, tensor in zip(bits, tensors, strict=True)
        ) / max(1, elements)
        span = f"{min(bits)}" if min(bits) == max(bits) else f"{min(bits)}-{max(bits)}"
        table.add_row(escape(part), f"{len(tensors)}", f"{elements:,}", span, f"{mean:.2f}")
    out.print(table)


def show_tensors(out: Console, summary: Summary) -> None:
    """One line a tensor."""
    measured = any(tensor.sqnr is not None for tensor in summary.tensors)
    table = _table("name", "shape", "dtype", "held as", "bytes", left=4)
    if measured:
        table.add_column("SQNR", justify="right")
        table.add_column("max error", justify="right")
    for tensor in summary.tensors:
        row = [
            escape(tensor.name),
            "x".join(map(str, tensor.shape)) or "scalar",
            tensor.dtype,
            tensor.kind if tensor.coding != "stored" else f"stored, {tensor.kind}",
            f"{tensor.nbytes:,}",
        ]
        if measured:
            error = "-" if tensor.max_error is None else f"{tensor.max_error:.3g}"
            row += [decibels(tensor.sqnr), error]
        table.add_row(*row)
    out.print(table)


def show_environment(out: Console, info: dict[str, Any]) -> None:
    """One line a fact."""
    for key, value in info.items():
        text = ", ".join(value) if isinstance(value, list) else str(value)
        out.print(f"{key.replace('_', ' '):<28} {escape('none' if value is None else text)}")


def show_evaluation(out: Console, evaluation: Evaluation) -> None:
    """One line a figure."""
    from birkhoff.evaluation.figures import figures

    for name, value in figures(evaluation):
        out.print(f"{name:<42} {value}", soft_wrap=True)


def decibels(value: float | None) -> str:
    """An SQNR for people."""
    if value is None:
        return "-"
    return "exact" if value == math.inf else f"{value:.2f} dB"


def _table(*headers: str, left: int = 1) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for index, header in enumerate(headers):
        if index < left:
            table.add_column(header, overflow="fold")
        else:
            table.add_column(header, justify="right")
    return table
