"""What a model's outputs lose when one of its tensors is coded."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from birkhoff import _core
from birkhoff.allocation.choices import relative_noise
from birkhoff.allocation.replay import Replay
from birkhoff.arrays import tensor_bytes
from birkhoff.dtypes import TORCH_DTYPES
from birkhoff.plan import best_matrix_view
from birkhoff.probes import Probe

#: The rate at which a tensor is tried. The error at others follows from their noise.
TRIAL_BITS = 4
#: An answer that is nearly nothing is measured against this share of the average one.
FLOOR = 0.05

#: In a model of more weights, the tensors of a block are tried together.
LARGE = 200_000_000


@torch.no_grad()
def measure_effects(
    model: nn.Module,
    names: Sequence[str],
    probe: Probe,
    *,
    codec: str = "shift",
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, float]:
    """The change of a model's outputs for each tensor that is coded alone.

    In a model of more than ``LARGE`` weights, the tensors of a block are coded together and are
    taken to have the same effect, which spares most of the time.

    Args:
        model: A model on the CPU in eval mode; it is as before at the end.
        names: Names of its state dict; those that it does not have are left out.
        probe: Runs the model.
        codec: The codec.
        progress: Called after every tensor.

    Returns:
        By name: the energy of the change, as a share of that of the outputs, for an error of the
        tensor as large as the tensor itself. Multiplied with the relative noise of a rate, it is
        what that rate costs.
    """
    replay = Replay(model, probe)
    reference = [answer.double() for answer in replay.result]
    tensors = model.state_dict()
    groups: dict[object, list[str]] = defaultdict(list)
    together = sum(tensor.numel() for tensor in tensors.values()) > LARGE
    for name in names:
        if name in tensors:
            groups[replay.part_of(name) if together else name].append(name)
    effects = {}
    for done, group in enumerate(groups.values(), start=1):
        originals = {name: tensors[name].clone() for name in group}
        total = 0.0
        try:
            for name, original in originals.items():
                decoded, noise = _decoded(original, codec)
                tensors[name].copy_(decoded)
                total += noise
            change = _change(reference, replay.again(group))
        finally:
            for name, original in originals.items():
                tensors[name].copy_(original)
        for name in group:
            effects[name] = change / total if total else 0.0
        if progress is not None:
            progress(group[-1], done, len(groups))
    return effects


def _decoded(tensor: Tensor, codec: str) -> tuple[Tensor, float]:
    """A tensor after coding, and the relative energy of its error."""
    dtype = TORCH_DTYPES[str(tensor.dtype)]
    _, rows, cols = best_matrix_view(tensor.shape, TRIAL_BITS, codec)
    matrix, distortion = _core.encode(
        tensor_bytes(tensor), dtype, rows, cols, bits=TRIAL_BITS, codec=codec
    )
    return torch.from_numpy(matrix.decode()).reshape(tensor.shape), relative_noise(distortion)


def _change(reference: Iterable[Tensor], answers: Iterable[Tensor]) -> float:
    """Mean over all answers of the relative energy of their change."""
    changes = []
    for before, after in zip(reference, answers, strict=True):
        energy = before.square().sum(-1)
        change = (after.double() - before).square().sum(-1)
        changes.append((change / (energy + FLOOR * energy.mean() + 1e-30)).flatten())
    return float(torch.cat(changes).mean())
