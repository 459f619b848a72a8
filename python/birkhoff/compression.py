"""Compresses a checkpoint into one safetensors file, and back."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from birkhoff._core import BirkhoffError, Distortion, File, Writer
from birkhoff.allocation import Target, allocate, check_target
from birkhoff.allocation.target import Measure
from birkhoff.checkpoint import Tensor, open_checkpoint
from birkhoff.files import require_compressed
from birkhoff.plan import Coded, Item, Stored, entry_of, make_plan, rules_in_use
from birkhoff.policy import SIXTEEN, check_bits, choose_policy
from birkhoff.summary import Summary, summarize

if TYPE_CHECKING:
    from torch import nn

    from birkhoff.feedback import Feedback
    from birkhoff.probes import Probe

#: Called after every tensor with its name, the bytes read so far, and the bytes in all.
Progress = Callable[[str, int, int], None]
#: Name patterns and the bits of the tensors that match.
Rules = Mapping[str, int] | Sequence[tuple[str, int]]


def compress_file(
    source: str | Path,
    output: str | Path,
    *,
    bits: int | None = None,
    codec: str = "shift",
    rules: Rules = (),
    skip: Sequence[str] = (),
    target_sqnr: float | None = None,
    target_ratio: float | None = None,
    auto: bool = False,
    feedback: bool = False,
    architecture: str | None = None,
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
        bits: Code bits a weight of the bulk of the model, 4 if None; :mod:`birkhoff.policy` says
            what small and sensitive tensors get.
        codec: ``"shift"`` or ``"winding"``.
        rules: Name patterns (as of :mod:`fnmatch`) and the bits of the tensors that match, 16 for
            not coded; later ones win.
        skip: Name patterns of tensors to keep exactly as they are.
        target_sqnr: Instead of ``bits``: each tensor gets the fewest bits that reach this SQNR, in
            dB.
        target_ratio: Instead of ``bits``: the file is to be this many times smaller, and the bits
            of each tensor are chosen for the least error.
        auto: Choose the bits of each tensor by its effect on the outputs of the model for synthetic
            inputs, for a file of the size that it would have without, or of ``target_ratio``. If
            the model cannot be run, all tensors count alike, and the summary's notes say so.
        feedback: Run the model on synthetic inputs, and choose the codes of each layer for the
            least error of its outputs for them. It takes longer; at 2 to 4 bits, masks keep much
            better.
        architecture: What a bare checkpoint is of, for ``auto`` and ``feedback``, as
            :func:`birkhoff.architectures.builder` takes it.
        overwrite: Replace the output if it exists.
        progress: Called after every tensor that is measured, and of those that are written.

    Raises:
        BirkhoffError: The input cannot be compressed: it is damaged, weights are not finite, or
            ``feedback`` cannot run the model.
        ValueError: An argument is wrong, or a pattern matches nothing.
        OSError: A file cannot be read or written.
    """
    start = time.perf_counter()
    output = Path(output)
    targeted = check_target(bits, target_sqnr, target_ratio, auto)
    bits = 4 if bits is None else bits
    user_rules = check_rules(rules, bits, codec)
    check_output(output, overwrite=overwrite)
    checkpoint = open_checkpoint(source)
    check_output(output, *checkpoint.files, overwrite=overwrite)
    if not checkpoint.tensors:
        raise BirkhoffError(f"{source}: the checkpoint holds no tensors")
    target = Target(target_sqnr, target_ratio) if targeted else None
    notes = list(checkpoint.notes)
    feedback_for = None
    if auto or feedback:
        _require_torch()
        from birkhoff.architectures import load_original

        try:
            model = load_original(Path(source), architecture)
            if target is not None and auto:
                target = replace(target, measure=_measure(model, codec, progress))
            if feedback:
                feedback_for = _feedback(model)
        except (BirkhoffError, ValueError, OSError) as error:
            if feedback:
                raise BirkhoffError(f"--feedback cannot run the model: {error}") from error
            notes.append(f"all tensors count alike, since the model cannot be run: {error}")
    plan, settings = decide(
        checkpoint.tensors,
        bits=bits,
        codec=codec,
        user_rules=user_rules,
        skip=skip,
        target=target,
        progress=progress,
    )
    if feedback_for is not None:
        settings["feedback"] = True
    distortions = write_plan(
        output,
        plan,
        codec,
        settings,
        feedback=feedback_for and feedback_for(coded_names(plan)),
        overwrite=overwrite,
        progress=progress,
    )
    return summarize(
        File(output),
        distortions,
        notes=notes,
        seconds=time.perf_counter() - start,
    )


def _require_torch() -> None:
    try:
        import birkhoff.architectures  # noqa: F401
    except ModuleNotFoundError as error:
        raise BirkhoffError(
            "--auto and --feedback run the model, which takes torch; install it with "
            '`pip install "birkhoff[torch]"`'
        ) from error


def _measure(model: nn.Module, codec: str, progress: Progress | None) -> Measure:
    """What measures the effects of tensors on a model's outputs.

    Raises:
        BirkhoffError: It is not known what inputs the model takes.
    """
    from birkhoff.allocation.effects import measure_effects

    probe = _probe(model, thorough=False)
    return partial(measure_effects, model, probe=probe, codec=codec, progress=progress)


def _feedback(model: nn.Module) -> Callable[[Sequence[str]], Feedback]:
    """What makes the feedback for tensors of a model, by their names.

    Raises:
        BirkhoffError: It is not known what inputs the model takes.
    """
    from birkhoff.feedback import Feedback

    return partial(Feedback, model, _probe(model, thorough=True))


def _probe(model: nn.Module, *, thorough: bool) -> Probe:
    from birkhoff.probes import probe_for

    probe = probe_for(model, thorough=thorough)
    if probe is None:
        raise BirkhoffError(f"it is not known what inputs {type(model).__name__} takes")
    return probe


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
    target: Target | None = None,
    progress: Progress | None = None,
) -> tuple[list[Item], dict[str, Any]]:
    """How each tensor of a checkpoint or a model is kept, and the settings that led to it.

    Raises:
        ValueError: A pattern matches nothing, or a target cannot be reached.
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
    if target is None:
        return plan, settings
    return allocate(target, plan, settings, user_rules=user_rules, skip=skip, progress=progress)


def coded_names(plan: Sequence[Item]) -> list[str]:
    """The tensors that a plan encodes, in its order."""
    return [item.tensor.name for item in plan if isinstance(item, Coded)]


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
    feedback: Feedback | None = None,
    overwrite: bool,
    progress: Progress | None,
) -> dict[str, Distortion]:
    """Writes a file, one tensor after the other; returns the distortion of those that change."""
    total = sum(item.tensor.elements for item in plan)
    done = 0
    distortions = {}
    entries: Any = [entry_of(item, codec) for item in plan]
    with Writer(output, entries, settings=json.dumps(settings), overwrite=overwrite) as writer:
        for item in plan:
            tensor = item.tensor
            if isinstance(item, Coded | Stored):
                factor = None
                if feedback is not None and isinstance(item, Coded):
                    factor = feedback.factor(tensor.name, item.cols)
                distortion = writer.write(tensor.name, tensor.read(), factor)
                if isinstance(item, Coded) or item.dtype != tensor.dtype:
                    distortions[tensor.name] = distortion
            done += tensor.elements
            if progress is not None:
                progress(tensor.name, done, total)
        writer.finish()
    return distortions
