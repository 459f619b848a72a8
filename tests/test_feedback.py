"""Error feedback from synthetic inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import birkhoff as package
from birkhoff import _core, feedback
from birkhoff.feedback import Feedback
from conftest import Run
from test_transformers import sam_config

transformers = pytest.importorskip("transformers")


class Mixer(nn.Module):
    """Layers of every kind, whose inputs are far from independent."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 64, 4, 4)
        self.mix = nn.Conv2d(64, 64, 3, padding=1)
        self.depthwise = nn.Conv2d(64, 64, 3, padding=1, groups=64)
        self.up = nn.Linear(64, 256)
        self.down = nn.Linear(256, 64)
        self.again = nn.Linear(256, 64)
        self.again.weight = self.down.weight
        self.unused = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.mix(self.patch(x)).relu()).flatten(2).transpose(1, 2)
        hidden = self.up(x).relu()
        outputs: Tensor = self.down(hidden) + self.again(hidden.roll(1, 1))
        return outputs


@pytest.fixture
def mixer() -> Mixer:
    torch.manual_seed(1)
    return Mixer().eval()


def pictures(seed: int) -> Tensor:
    """Smooth random pictures."""
    noise = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(noise, (32, 32), mode="bicubic")


def run(model: nn.Module) -> list[Tensor]:
    return [model(pictures(0)[:2]), model(pictures(0)[2:])]


def moments_of(measured: Feedback, name: str, cols: int) -> Tensor:
    factor = measured.factor(name, cols)
    assert factor is not None
    assert np.array_equal(np.triu(factor), factor)
    return torch.from_numpy(factor @ factor.T)


def test_factors_are_of_the_damped_moments_of_the_inputs(mixer: Mixer) -> None:
    with torch.no_grad():
        patches = nn.functional.unfold(pictures(0), 4, stride=4).transpose(1, 2).reshape(-1, 48)
        windows = nn.functional.unfold(mixer.patch(pictures(0)), 3, padding=1)
        hidden = mixer.up(
            mixer.depthwise(mixer.mix(mixer.patch(pictures(0))).relu()).flatten(2).transpose(1, 2)
        ).relu()
    both = torch.cat([hidden, hidden.roll(1, 1)]).reshape(-1, 256)
    expected = {
        "patch.weight": patches,
        "mix.weight": windows.transpose(1, 2).reshape(-1, 576),
        "down.weight": both,
    }
    measured = Feedback(mixer, run, list(expected))
    for name, inputs in expected.items():
        moments = inputs.T @ inputs
        moments += 0.03 * moments.diagonal().mean() * torch.eye(len(moments))
        found = moments_of(measured, name, len(moments))
        torch.testing.assert_close(found, moments, rtol=1e-3, atol=1e-4 * float(moments.max()))
    assert not any(module._forward_pre_hooks for module in mixer.modules())


def test_what_is_no_layer_or_was_not_run_has_no_factor(mixer: Mixer) -> None:
    names = ["depthwise.weight", "unused.weight", "up.bias", "up.weight", "no such tensor"]
    measured = Feedback(mixer, run, names)
    for name in (*names[:3], names[4]):
        assert measured.factor(name, 64) is None
    assert measured.factor("up.weight", 32) is None  # another matrix than that of the layer
    assert measured.factor("up.weight", 64) is not None


def test_a_small_memory_takes_several_runs(mixer: Mixer, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["patch.weight", "mix.weight", "up.weight", "down.weight"]
    sizes = [48, 576, 64, 256]
    runs = 0

    def counted(model: nn.Module) -> list[Tensor]:
        nonlocal runs
        runs += 1
        return run(model)

    at_once = Feedback(mixer, counted, names)
    expected = [at_once.factor(name, cols) for name, cols in zip(names, sizes, strict=True)]
    assert runs == 1
    monkeypatch.setattr(feedback, "MEMORY", 4 * (64**2 + 256**2))
    in_turn = Feedback(mixer, counted, names)
    found = [in_turn.factor(name, cols) for name, cols in zip(names, sizes, strict=True)]
    assert runs == 1 + 3
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_outputs_keep_better(mixer: Mixer, bits: int) -> None:
    fresh = pictures(1)
    with torch.no_grad():
        expected = mixer(fresh)
    errors = []
    for probe in (False, run):
        torch.manual_seed(1)
        model = package.compress(Mixer().eval(), bits=bits, rules={"*": bits}, feedback=probe)
        with torch.no_grad():
            errors.append(float((model(fresh) - expected).square().mean()))
    assert errors[1] < 0.75 * errors[0], errors


def test_commands_and_modules_give_the_same_codes(tmp_path: Path, birkhoff: Run) -> None:
    torch.manual_seed(5)
    model = transformers.SamModel(sam_config()).eval()
    folder, output = tmp_path / "model", tmp_path / "coded.safetensors"
    model.save_pretrained(folder)
    plain = birkhoff("compress", folder, "-o", tmp_path / "plain.safetensors", "--bits", "3")
    fed = birkhoff("compress", folder, "-o", output, "--bits", "3", "--feedback")
    assert plain.returncode == fed.returncode == 0, fed.stderr
    assert "error feedback" in fed.stdout
    assert "error feedback" not in plain.stdout
    assert abs(output.stat().st_size - (tmp_path / "plain.safetensors").stat().st_size) <= 64

    compressed = package.compress(model, bits=3, feedback=True)
    saved = tmp_path / "saved.safetensors"
    package.save(compressed, saved)
    files = [_core.File(path) for path in (output, saved, tmp_path / "plain.safetensors")]
    coded = [entry.name for entry in files[0].entries() if entry.coding == "coded"]
    same = [
        [np.array_equal(files[0].matrix(name).codes, file.matrix(name).codes) for name in coded]
        for file in files[1:]
    ]
    # Sums of floats may fall on either side of a choice of codes.
    assert np.mean(same[0]) > 0.9
    assert np.mean(same[1]) < 0.5


def test_models_that_cannot_be_run_are_refused(tmp_path: Path, birkhoff: Run, mixer: Mixer) -> None:
    path = tmp_path / "mixer.pt"
    torch.save(mixer.state_dict(), path)
    result = birkhoff("compress", path, "-o", tmp_path / "out.safetensors", "--feedback")
    assert result.returncode == 1
    assert "--feedback cannot run the model" in result.stderr
    assert not (tmp_path / "out.safetensors").exists()
    with pytest.raises(ValueError, match="give feedback a function"):
        package.compress(mixer, feedback=True)
    assert isinstance(mixer.up, nn.Linear)


@pytest.mark.parametrize(
    ("factor", "message"),
    [
        (np.eye(63, dtype=np.float32), "63 columns, the matrix has 64"),
        (np.ones((64, 63), np.float32), "must be a square matrix"),
        (np.asfortranarray(np.triu(np.ones((64, 64), np.float32))), "C-contiguous"),
        (np.zeros((64, 64), np.float32), "not that of a positive definite matrix"),
    ],
)
def test_wrong_factors_are_refused(factor: Any, message: str, tmp_path: Path) -> None:
    data = np.ones(16 * 64, np.float32).view(np.uint8)
    with pytest.raises(ValueError, match=message):
        _core.encode(data, "F32", 16, 64, factor=factor)
    plan: Any = [("coded", "w", "F32", (16, 64), 16, 64, 4, "shift")]
    with _core.Writer(tmp_path / "file", plan) as writer:
        with pytest.raises(ValueError, match=message):
            writer.write("w", data, factor)
        writer.write("w", data)
        writer.finish()
