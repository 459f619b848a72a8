"""Compresses a checkpoint into one safetensors file, and back."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from birkhoff._core import BirkhoffError, Distortion, File, Writer
from birkhoff.checkpoint import Tensor, open_checkpoint
from birkhoff.files import require_compressed
from birkhoff.plan import Coded, Item, Stored, make_plan, rules_in_use
from birkhoff.policy import SIXTEEN, check_bits, choose_policy
from birkhoff.summary import Summary, summarize

#: Called after every tensor with its name, the bytes read so far, and the bytes in all.
Progress = Callable[[str, int, int], None]
#: Name patterns and the bits of the tensors that match.
Rules = Mapping[str, int] | Sequence[tuple[str, int]]


def compress_file(
    source: str | Path,
    output: str | Path,
    *,
    bits: int = 4,
    codec: str = "shift",
    rules: Rules = (),
    skip: Sequence[str] = (),
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Summary:
    """Compresses a checkpoint, one tensor at a time.

    The output is written beside its place under a temporary name and renamed at the end: it is
    there as a whole or not at all.

    Args:
        source: A ``.safetensors`` file, a PyTorch checkpoint that holds a state dict, or a Hugging
            Face folder.
        output: The safetensors file to write.
        bits: Code bits a weight of the bulk of the model; :mod:`birkhoff.policy` says what small
            and sensitive tensors get.
        codec: ``"shift"`` or ``"winding"``.
        rules: Name patterns (as of :mod:`fnmatch`) and the bits of the tensors that match, 16 for
            not coded; later ones win.
        skip: Name patterns of tensors to keep exactly as they are.
        overwrite: Replace the output if it exists.
        progress: Called after every tensor.

    Raises:
        BirkhoffError: The input cannot be compressed: it is damaged, or weights are not finite.
        ValueError: An argument is wrong, or a pattern matches nothing.
        OSError: A file cannot be read or written.
    """
    start = time.perf_counter()
    output = Path(output)
    user_rules = check_rules(rules, bits, codec)
    check_output(output, overwrite=overwrite)
    checkpoint = open_checkpoint(source)
    check_output(output, *checkpoint.files, overwrite=overwrite)
    if not checkpoint.tensors:
        raise BirkhoffError(f"{source}: the checkpoint holds no tensors")
    plan, settings = decide(
        checkpoint.tensors, bits=bits, codec=codec, user_rules=user_rules, skip=skip
    )
    distortions = write_plan(output, plan, codec, settings, overwrite=overwrite, progress=progress)
    return summarize(
        File(output),
        distortions,
        notes=checkpoint.notes,
        seconds=time.perf_counter() - start,
    )


def decompress_file(
    source: str | Path,
    output: str | Path,
    *,
    overwrite: bool = False,
    progress: Callable[[str], None] | None = None,
) -> int:
    """Writes an ordinary safetensors file with the original names, shapes and dtypes.

    Args:
        source: A file written by :func:`compress_file`.
        output: The safetensors file to write.
        overwrite: Replace the output if it exists.
        progress: Called after every tensor with its name.

    Returns:
        The bytes written.

    Raises:
        BirkhoffError: The file is damaged or was not written by :func:`compress_file`.
        OSError: A file cannot be read or written.
    """
    source, output = Path(source), Path(output)
    check_output(output, source, overwrite=overwrite)
    file = require_compressed(source)
    return file.decompress(output, overwrite=overwrite, progress=progress)


def check_rules(rules: Rules, bits: int, codec: str) -> list[tuple[str, int]]:
    """The rules as pairs.

    Raises:
        ValueError: The codec does not exist, or lacks the rate of the bulk or of a rule.
    """
    user_rules = list(rules.items()) if isinstance(rules, Mapping) else list(rules)
    check_bits(bits, codec)
    for pattern, rate in user_rules:
        if rate != SIXTEEN:
            try:
                check_bits(rate, codec)
            except ValueError as error:
                raise ValueError(f"--rule {pattern}={rate}: {error}") from error
    return user_rules


def decide(
    tensors: Sequence[Tensor],
    *,
    bits: int,
    codec: str,
    user_rules: Sequence[tuple[str, int]],
    skip: Sequence[str],
) -> tuple[list[Item], dict[str, Any]]:
    """How each tensor of a checkpoint or a model is kept, and the settings that led to it.

    Raises:
        ValueError: A pattern matches nothing.
    """
    policy = choose_policy(tensors, bits=bits, codec=codec, user_rules=user_rules)
    plan = make_plan(
        tensors, policy, user_patterns=[pattern for pattern, _ in user_rules], skip=skip
    )
    settings = {
        "bits": bits,
        "codec": codec,
        "model": policy.model,
        "rules": [[rule.pattern, rule.bits] for rule in rules_in_use(policy, plan)],
        "skip": list(skip),
    }
    return plan, settings


def check_output(output: Path, *inputs: Path, overwrite: bool) -> None:
    """Refuses an output that is one of the inputs, or that exists and may not be replaced."""
    if not output.exists():
        return
    if any(path.exists() and output.samefile(path) for path in inputs):
        raise ValueError(f"{output}: the output is the input itself; choose another name")
    if output.is_dir():
        raise IsADirectoryError(f"{output}: the output is a folder; give the name of a file in it")
    if not overwrite:
        raise FileExistsError(
            f"{output}: the file exists; choose another name, "
            "or replace it with --force (overwrite=True in Python)"
        )


def write_plan(
    output: Path,
    plan: Sequence[Item],
    codec: str,
    settings: dict[str, Any],
    *,
    overwrite: bool,
    progress: Progress | None,
) -> dict[str, Distortion]:
    """Writes a file, one tensor after the other; returns the distortion of those that change."""
    total = sum(item.tensor.elements for item in plan)
    done = 0
    distortions = {}
    entries = [_entry(item, codec) for item in plan]
    with Writer(output, entries, settings=json.dumps(settings), overwrite=overwrite) as writer:
        for item in plan:
            tensor = item.tensor
            if isinstance(item, Coded | Stored):
                distortion = writer.write(tensor.name, tensor.read())
                if isinstance(item, Coded) or item.dtype != tensor.dtype:
                    distortions[tensor.name] = distortion
            done += tensor.elements
            if progress is not None:
                progress(tensor.name, done, total)
        writer.finish()
    return distortions


def _entry(item: Item, codec: str) -> tuple[Any, ...]:
    """The item as the writer takes it."""
    tensor = item.tensor
    what = (tensor.name, tensor.dtype, tensor.shape)
    match item:
        case Coded(_, rows, cols, bits):
            return ("coded", *what, rows, cols, bits, codec)
        case Stored(_, dtype):
            return ("stored", *what, dtype)
        case _:
            return ("tied", *what, item.to)
