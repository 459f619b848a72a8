"""The command line: compress, inspect, decompress, verify, eval, env, demo.

Exit codes: 0 if all went well, 1 for bad input or a failed verification, 2 for wrong usage, 130
after an interrupt.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal, NoReturn

import typer

app = typer.Typer(
    name="birkhoff",
    help="Compress Segment Anything models, and any other, without data.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Bits = Literal["2", "3", "4", "5", "6", "8"]
Codec = Literal["shift", "winding"]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace the output if it exists.")]
ArchitectureOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="What a bare checkpoint is of, if its shapes do not say: vit_b, vit_l, vit_h of "
        "segment_anything, or a folder with a config.json.",
    ),
]
OutputOption = Annotated[
    Path, typer.Option("--output", "-o", metavar="FILE", help="The safetensors file to write.")
]


def _show_version(wanted: bool) -> None:
    if wanted:
        from birkhoff import __version__

        print(f"birkhoff {__version__}")
        raise typer.Exit


@app.callback()
def _birkhoff(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    pass


@app.command()
def compress(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="INPUT",
            help="A .safetensors file, a PyTorch checkpoint (.pth, .pt, .bin) or a Hugging Face "
            "folder.",
        ),
    ],
    output: OutputOption,
    bits: Annotated[
        Bits | None,
        typer.Option(
            help="Bits a weight of the bulk (4 by default); small sensitive tensors get more."
        ),
    ] = None,
    codec: Annotated[
        Codec, typer.Option(help="The trajectory; winding has 4, 5, 6 and 8 bits.")
    ] = "shift",
    rule: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN=BITS",
            help="Bits for the tensors whose names match, 16 to leave them in 16 bit; may be "
            "repeated, later ones win.",
        ),
    ] = None,
    skip: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Keep the tensors whose names match exactly as they are; may be repeated.",
        ),
    ] = None,
    target_sqnr: Annotated[
        float | None,
        typer.Option(metavar="DB", help="The fewest bits for each tensor that reach this SQNR."),
    ] = None,
    target_ratio: Annotated[
        float | None,
        typer.Option(
            metavar="R", help="Bits for each tensor that make the file R times smaller at best."
        ),
    ] = None,
    auto: Annotated[
        bool,
        typer.Option(
            "--auto",
            help="Choose bits by each tensor's effect on the model's outputs for synthetic inputs; "
            "the file is as large as without, or as --target-ratio says.",
        ),
    ] = False,
    feedback: Annotated[
        bool,
        typer.Option(
            "--feedback",
            help="Run the model on synthetic inputs and let weights make up for the errors of "
            "others: takes longer, keeps masks much better at 2 to 4 bits.",
        ),
    ] = False,
    architecture: ArchitectureOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Compress a checkpoint into one safetensors file."""
    rules = [_parse_rule(text) for text in rule or []]
    from birkhoff.allocation import check_target
    from birkhoff.compression import compress_file
    from birkhoff.display import console, progress_bar, show_summary
    from birkhoff.policy import check_bits

    wanted = None if bits is None else int(bits)
    try:
        check_bits(wanted or 4, codec)
        check_target(wanted, target_sqnr, target_ratio, auto)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    with progress_bar("compressing") as progress:
        summary = compress_file(
            source,
            output,
            bits=wanted,
            codec=codec,
            rules=rules,
            skip=skip or [],
            target_sqnr=target_sqnr,
            target_ratio=target_ratio,
            auto=auto,
            feedback=feedback,
            architecture=architecture,
            overwrite=force,
            progress=progress,
        )
    if as_json:
        _print_json(summary.to_json())
    else:
        show_summary(console(), summary)


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A safetensors file.")],
    as_json: JsonOption = False,
) -> None:
    """List what a compressed file (or any other safetensors file) holds."""
    from birkhoff._core import File
    from birkhoff.display import console, show_summary, show_tensors
    from birkhoff.summary import summarize

    summary = summarize(File(file))
    if as_json:
        _print_json(summary.to_json())
    else:
        show_tensors(console(), summary)
        show_summary(console(), summary)


@app.command()
def decompress(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A compressed file.")],
    output: OutputOption,
    force: ForceOption = False,
) -> None:
    """Write an ordinary safetensors file with the original names, shapes and dtypes."""
    from birkhoff.compression import decompress_file
    from birkhoff.display import progress_bar
    from birkhoff.files import require_compressed

    total = len(require_compressed(file).entries())
    done = 0
    with progress_bar("decompressing") as progress:

        def count(name: str) -> None:
            nonlocal done
            done += 1
            progress(name, done, total)

        nbytes = decompress_file(file, output, overwrite=force, progress=count)
    print(f"{output}: {nbytes:,} bytes")


@app.command()
def verify(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A compressed file.")],
    against: Annotated[
        Path | None,
        typer.Option(
            metavar="ORIGINAL", help="The checkpoint it was made from; without it, only checksums."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check a compressed file's checksums, and every tensor against the original."""
    from birkhoff.display import console, progress_bar, show_summary, show_tensors
    from birkhoff.verify import verify_file

    with progress_bar("verifying") as progress:
        verification = verify_file(file, against, progress=progress)
    if as_json:
        _print_json(verification.to_json())
    else:
        show_tensors(console(), verification.summary)
        show_summary(console(), verification.summary)
    for problem in verification.problems:
        print(f"birkhoff: error: {file}: {problem}", file=sys.stderr)
    if not verification.ok:
        raise typer.Exit(1)
    if not as_json:
        print("verified: " + ("all tensors match" if against else "all checksums match"))


@app.command("eval")
def evaluate(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL", help="A compressed file, or a transformers folder that holds one."
        ),
    ],
    against: Annotated[
        Path,
        typer.Option(
            metavar="ORIGINAL", help="The original: a transformers folder or a checkpoint."
        ),
    ],
    images: Annotated[
        Path, typer.Option(metavar="DIR", help="A folder of pictures; they need no labels.")
    ],
    prompts: Annotated[
        Literal["points", "boxes", "grid"],
        typer.Option(help="Points or boxes drawn from the original's own masks, or a grid."),
    ] = "points",
    annotations: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Objects in the format of COCO, to measure both by."),
    ] = None,
    architecture: ArchitectureOption = None,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write an HTML page with the worst masks.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the report if it exists.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the choice of prompts.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Compare the masks of a compressed model with those of its original on your pictures."""
    from birkhoff.compression import check_output
    from birkhoff.display import console, progress_bar, show_evaluation
    from birkhoff.evaluation.pictures import find_pictures

    # What can be wrong is found before models are loaded.
    pictures = find_pictures(images)
    if report is not None:
        check_output(report, overwrite=force)
    from birkhoff import evaluation
    from birkhoff._core import BirkhoffError

    try:
        from birkhoff.architectures import load_pair
    except ModuleNotFoundError as error:
        raise BirkhoffError(
            'this runs models, which takes torch; install it with `pip install "birkhoff[eval]"`'
        ) from error
    from birkhoff.evaluation.report import check_installed

    if report is not None:
        check_installed()
    objects = None if annotations is None else evaluation.read_annotations(annotations)
    compressed, original = load_pair(model, against, architecture)
    with progress_bar("comparing masks") as progress:
        result = evaluation.evaluate(
            compressed,
            original,
            pictures,
            prompts=prompts,
            annotations=objects,
            seed=seed,
            progress=progress,
        )
    if report is not None:
        evaluation.write_report(
            report, result, compressed=str(model), original=str(against), overwrite=force
        )
    if as_json:
        _print_json(result.to_json())
    else:
        show_evaluation(console(), result)
        if report is not None:
            print(f"report: {report}")


@app.command()
def env(as_json: JsonOption = False) -> None:
    """Show versions, CPU features in use, threads, torch and CUDA."""
    from birkhoff.display import console, show_environment
    from birkhoff.environment import environment

    info = environment()
    if as_json:
        _print_json(info)
    else:
        show_environment(console(), info)


@app.command()
def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="The picture to write.")
    ] = Path("birkhoff-demo.png"),
    bits: Annotated[Bits, typer.Option(help="Bits a weight of the bulk.")] = "4",
    image: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="A picture to segment besides the scenes, instead of a photo."
        ),
    ] = None,
    force: ForceOption = False,
) -> None:
    """Segment with a small model and with the same model compressed, and draw both."""
    from birkhoff.demo import run_demo
    from birkhoff.display import console, show_summary

    summary, _ = run_demo(output, bits=int(bits), image=image, overwrite=force)
    show_summary(console(), summary)


def _parse_rule(text: str) -> tuple[str, int]:
    pattern, _, bits = text.rpartition("=")
    if not pattern or not bits.isdecimal():
        raise typer.BadParameter(f"{text!r} is not of the form PATTERN=BITS, such as '*neck*=8'")
    return pattern, int(bits)


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, indent=2, allow_nan=False))


def _fail(message: str, code: int) -> NoReturn:
    print(f"birkhoff: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def _describe(error: Exception) -> str:
    """One sentence for an error that a user can mend."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    """Leaves as after an interrupt, so that unfinished files are removed."""
    sys.exit(128 + number)


def main() -> None:
    """Runs the command line and exits."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        code = app(standalone_mode=False)
        sys.stdout.flush()
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except BrokenPipeError:
        # The reader of our output has gone; nothing more may be written to it at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        usage = getattr(error, "format_message", None)
        if usage is not None:
            if not usage():  # No arguments at all: the help was shown.
                sys.exit(2)
            _fail(f"{usage()} (`birkhoff --help` shows how)", 2)
        # BirkhoffError is all that its own code raises besides these; any other is a bug.
        from birkhoff._core import BirkhoffError

        if isinstance(error, BirkhoffError | ValueError | OSError):
            _fail(_describe(error), 1)
        raise
    if code == 130:
        _fail("interrupted", 130)
    sys.exit(code if isinstance(code, int) else 0)
