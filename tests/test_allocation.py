"""Bits chosen for each tensor."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn

import birkhoff as package
from birkhoff.allocation.choices import Choice, cheapest, choices_of
from birkhoff.allocation.effects import measure_effects
from birkhoff.allocation.replay import Replay
from birkhoff.checkpoint import open_checkpoint
from birkhoff.plan import could_be_coded
from birkhoff.probes import probe_for
from conftest import Arrays, Run
from test_models import Model
from test_transformers import sam_config

transformers = pytest.importorskip("transformers")

RunJson = Callable[..., Any]


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "compressed.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small SAM with random weights."""
    torch.manual_seed(5)
    model = transformers.SamModel(sam_config()).eval()
    model.save_pretrained(tmp_path / "original")
    return tmp_path / "original"


def coded(summary: Any) -> dict[str, int]:
    return {t["name"]: t["bits"] for t in summary["tensors"] if t["coding"] == "coded"}


def all_sums(choices: dict[str, list[Choice]], budget: int) -> float:
    """The least error by trying all."""
    return min(
        sum(choice.noise for choice in combination)
        for combination in itertools.product(*choices.values())
        if sum(choice.nbytes for choice in combination) <= budget
    )


def test_the_cheapest_choices() -> None:
    rng = np.random.default_rng(0)
    losses = []
    for _ in range(50):
        choices = {}
        for name in "abcde":
            weights, effect = int(rng.integers(100, 1000)), float(rng.lognormal(0, 2))
            choices[name] = [
                Choice(bits, weights * bits // 8, effect * 4.0**-bits * rng.uniform(0.7, 1.4))
                for bits in (2, 3, 4, 6)
            ]
        least = sum(options[0].nbytes for options in choices.values())
        budget = int(least * rng.uniform(1, 2.5))
        chosen = cheapest(choices, budget)
        assert chosen.keys() == choices.keys()
        assert sum(choice.nbytes for choice in chosen.values()) <= budget
        error = sum(choice.noise for choice in chosen.values())
        losses.append(error / all_sums(choices, budget))
        assert losses[-1] >= 1 - 1e-9
    # The best of all, but for what is left over of the budget.
    assert np.median(losses) < 1.1
    with pytest.raises(ValueError, match="too small"):
        cheapest(choices, least - 1)


def test_choices_that_make_nothing_better_are_left_out() -> None:
    choices = {"a": [Choice(2, 20, 1.0), Choice(3, 30, 1.5), Choice(4, 40, 0.5)]}
    assert cheapest(choices, 39)["a"].bits == 2
    assert cheapest(choices, 40)["a"].bits == 4
    assert cheapest({"zeros": [Choice(2, 20, 0.0), Choice(3, 30, 0.0)]}, 99)["zeros"].bits == 2


def test_choices_of_tensors(model: Path, arrays: Arrays) -> None:
    tensors = {tensor.name: tensor for tensor in open_checkpoint(model).tensors}
    choices = choices_of(tensors["blocks.0.mlp.fc1.weight"], "shift")
    assert [choice.bits for choice in choices] == [2, 3, 4, 5, 6, 8, 16]
    assert [c.nbytes for c in choices] == sorted(c.nbytes for c in choices)
    decibels = [-10 * np.log10(choice.noise) for choice in choices[:-1]]
    assert decibels == pytest.approx([11, 17.2, 23.2, 29.2, 34.7, 43.2], abs=0.8)
    # Codes of so small a tensor would be larger than itself.
    assert [choice.bits for choice in choices_of(tensors["one.weight"], "shift")] == [16]


@pytest.mark.parametrize("target", [10, 22, 30, 41, 60])
def test_target_sqnr(run_json: RunJson, model: Path, output: Path, target: int) -> None:
    summary = run_json("compress", model, "-o", output, "--target-sqnr", target)
    for tensor in summary["tensors"]:
        if tensor["coding"] == "coded":
            assert tensor["sqnr_db"] >= target
    bits = coded(summary)
    if target == 60:
        assert bits == {}
    else:
        name, rates = "blocks.0.mlp.fc1.weight", [2, 3, 4, 5, 6, 8]
        assert bits[name] == {10: 2, 22: 4, 30: 6, 41: 8}[target]
        if bits[name] > 2:
            fewer = rates[rates.index(bits[name]) - 1]
            options = ["--force", "--rule", f"{name}={fewer}"]
            lower = run_json("compress", model, "-o", output, "--target-sqnr", target, *options)
            assert coded(lower)[name] == fewer
            ratios = {tensor["name"]: tensor["sqnr_db"] for tensor in lower["tensors"]}
            assert ratios[name] < target
    assert summary["settings"]["bits"] is None
    assert summary["settings"]["allocation"] == {"sqnr_db": target}


@pytest.mark.parametrize("target", [4, 4.5, 6])
def test_target_ratio(run_json: RunJson, model: Path, output: Path, target: float) -> None:
    summary = run_json("compress", model, "-o", output, "--target-ratio", target)
    assert summary["nbytes"] == output.stat().st_size
    assert target <= summary["ratio"] < 1.06 * target
    assert run_json("verify", output, "--against", model)["ok"]


def test_what_the_user_has_decided_stays(run_json: RunJson, model: Path, output: Path) -> None:
    options = ["--target-ratio", 2.5, "--skip", "volume*", "--rule", "blocks.*=3"]
    summary = run_json("compress", model, "-o", output, *options)
    kinds = {tensor["name"]: tensor["kind"] for tensor in summary["tensors"]}
    assert kinds["volume.weight"] == "F32"
    assert kinds["blocks.0.mlp.fc1.weight"] == "3 bits"
    assert summary["ratio"] >= 2.5


def test_the_error_is_less_than_with_even_bits(
    run_json: RunJson, folder: Path, output: Path
) -> None:
    even = run_json("compress", folder, "-o", output, "--bits", 3, "--rule", "*=3")
    ratio = str(even["ratio"] * (1 - 1e-9))
    chosen = run_json("compress", folder, "-o", output, "--target-ratio", ratio, "--force")
    assert chosen["nbytes"] <= even["nbytes"]

    def error(summary: Any) -> float:
        ratios = (tensor["sqnr_db"] for tensor in summary["tensors"])
        return float(sum(10 ** (-ratio / 10) for ratio in ratios if ratio is not None))

    assert error(chosen) < error(even)


def test_the_allocation_is_shown(birkhoff: Run, model: Path, output: Path) -> None:
    done = birkhoff("compress", model, "-o", output, "--target-ratio", 4)
    assert done.returncode == 0, done.stderr
    assert "allocation: the least error in a file 4 times smaller" in done.stdout
    assert "blocks.*.mlp.fc*.weight" in done.stdout
    shown = birkhoff("inspect", output).stdout
    assert "allocation: the least error" in shown


def test_auto_keeps_the_size(run_json: RunJson, folder: Path, output: Path) -> None:
    plain = run_json("compress", folder, "-o", output)
    first = run_json("compress", folder, "-o", output, "--auto", "--force")
    content = output.read_bytes()
    assert 0.97 * plain["nbytes"] <= first["nbytes"] <= plain["nbytes"]
    assert first["notes"] == []
    assert first["settings"]["allocation"]["errors"] == "by effect on the outputs"
    run_json("compress", folder, "-o", output, "--auto", "--force")
    assert output.read_bytes() == content


def test_auto_without_a_model(run_json: RunJson, folder: Path, output: Path) -> None:
    bare = folder / "model.safetensors"
    summary = run_json("compress", bare, "-o", output, "--auto", "--target-ratio", 4.5)
    assert len(summary["notes"]) == 1
    assert "cannot be run" in summary["notes"][0]
    alike = run_json("compress", bare, "-o", output, "--target-ratio", 4.5, "--force")
    assert coded(summary) == coded(alike)
    named = ["--auto", "--architecture", folder, "--force"]
    assert run_json("compress", bare, "-o", output, *named)["notes"] == []


def test_targets_that_exclude_each_other(
    refused: Callable[..., str], model: Path, output: Path
) -> None:
    def complaint(*options: str, code: int = 2) -> str:
        return refused("compress", model, "-o", output, *options, code=code)

    assert "--bits" in complaint("--bits", "4", "--target-sqnr", "30")
    assert "--bits" in complaint("--bits", "4", "--target-ratio", "5", "--auto")
    assert "choose one" in complaint("--target-ratio", "5", "--target-sqnr", "30")
    assert "choose one" in complaint("--auto", "--target-sqnr", "30")
    assert "between" in complaint("--target-sqnr", "-3")
    assert "between" in complaint("--target-sqnr", "nan")
    assert "between" in complaint("--target-ratio", "0.5")
    assert "at the lowest rates it is" in complaint("--target-ratio", "40", code=1)


def test_weights_that_are_not_finite(
    refused: Callable[..., str], tmp_path: Path, model: Path, output: Path
) -> None:
    arrays = load_file(model)
    arrays["blocks.0.mlp.fc1.weight"][3, 5] = np.nan
    save_file(arrays, tmp_path / "damaged.safetensors")
    for option in (["--target-sqnr", "20"], ["--target-ratio", "4"]):
        message = refused("compress", tmp_path / "damaged.safetensors", "-o", output, *option)
        assert "blocks.0.mlp.fc1.weight" in message


def test_models_in_memory(folder: Path, tmp_path: Path) -> None:
    from birkhoff.architectures import load_folder

    path = tmp_path / "saved.safetensors"
    limit = package.save(package.compress(load_folder(folder)), path)
    model = package.compress(load_folder(folder), auto=True)
    assert 0.97 * limit <= package.save(model, path, overwrite=True) <= limit
    assert vars(model)["birkhoff_settings"] == package.open(path).settings
    smaller = package.compress(load_folder(folder), target_ratio=4.5)
    original = sum(tensor.numel() * 4 for tensor in load_folder(folder).parameters())
    assert original / package.save(smaller, path, overwrite=True) >= 4.5


def test_a_policy_of_the_lowest_rates_leaves_nothing_to_choose() -> None:
    torch.manual_seed(0)

    def run(model: nn.Module) -> list[Tensor]:
        return [model(torch.ones(4, 256))]

    model = package.compress(Amplified().eval(), 2, rules={"quiet.*": 2}, auto=run)
    rules = dict(vars(model)["birkhoff_settings"]["rules"])
    assert set(rules.values()) == {2}


def test_a_model_that_nothing_is_known_of() -> None:
    torch.manual_seed(0)
    model = Model().eval()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="give auto a function"):
        package.compress(model, auto=True)
    with pytest.raises(ValueError, match="--bits goes without"):
        package.compress(model, 4, target_sqnr=30)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, state[name], rtol=0, atol=0)
    package.compress(model, auto=lambda model: [model(torch.ones(1, 3, 32, 32))[..., 0]])
    assert vars(model)["birkhoff_settings"]["allocation"]["errors"] == "by effect on the outputs"


class Amplified(nn.Module):
    """Two layers of one size; the output is mostly that of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.loud = nn.Linear(256, 64, bias=False)
        self.quiet = nn.Linear(256, 64, bias=False)
        self.unused = nn.Linear(256, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.loud(x) + 0.05 * self.quiet(x)
        return y


def test_effects() -> None:
    torch.manual_seed(1)
    model = Amplified().eval()
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(32, 256)
    names = ["loud.weight", "quiet.weight", "unused.weight", "missing.weight"]
    effects = measure_effects(model, names, lambda model: [model(x)])
    assert effects.keys() == set(names[:3])
    # An error as large as the layer itself changes as much as the layer gives.
    assert effects["loud.weight"] == pytest.approx(1, rel=0.2)
    assert effects["quiet.weight"] == pytest.approx(0.05**2, rel=0.2)
    assert effects["unused.weight"] == 0
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_what_is_heard_gets_the_bits() -> None:
    torch.manual_seed(1)
    x = torch.randn(32, 256)
    original = Amplified().eval()
    with torch.no_grad():
        expected = original(x)
    errors = {}
    for auto in (False, lambda model: [model(x)]):
        model = package.compress(
            copy.deepcopy(original), target_ratio=5.5, auto=auto, precision="highest"
        )
        errors[bool(auto)] = float((model(x) - expected).square().mean())
    assert errors[True] < 0.5 * errors[False]


@pytest.mark.filterwarnings("ignore")
def test_replays_give_what_runs_give(folder: Path) -> None:
    from birkhoff.architectures import load_folder

    torch.manual_seed(0)
    image = torch.randn(2, 3, 32, 32)
    sam = load_folder(folder)
    probe = probe_for(sam)
    assert probe is not None

    def run(model: nn.Module) -> Sequence[Tensor]:
        return [model(image)]

    for model, runs in ((Model().eval(), run), (sam, probe)):
        with torch.no_grad():
            replay = Replay(model, runs)
            tensors = model.state_dict()
            for name in [t.name for t in coded_tensors(model)]:
                original = tensors[name].clone()
                tensors[name].mul_(1.5)
                for mine, true in zip(replay.again([name]), runs(model), strict=True):
                    torch.testing.assert_close(mine, true, rtol=0, atol=0)
                tensors[name].copy_(original)
            for mine, true in zip(replay.result, runs(model), strict=True):
                torch.testing.assert_close(mine, true, rtol=0, atol=0)


def coded_tensors(model: nn.Module) -> list[Any]:
    from birkhoff.torch_checkpoint import tensors_of

    tensors = tensors_of(model.state_dict(), "model")
    return [t for t in tensors if could_be_coded(t) and t.tied_to is None]


def test_replays_skip_what_came_before() -> None:
    calls: list[int] = []

    class Counted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(id(self))
            x = super().forward(x)
            return x.add_(1)  # in place, as some blocks do

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Counted(4, 4) for _ in range(5))
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
                x.mul_(2)
            return x * self.scale

    torch.manual_seed(0)
    model = Chain().eval()
    with torch.no_grad():
        replay = Replay(model, lambda model: model(torch.ones(1, 4)))
        for changed, expected in (("blocks.3.weight", 2), ("blocks.0.bias", 5), ("scale", 5)):
            calls.clear()
            model.state_dict()[changed].add_(0.5)
            torch.testing.assert_close(replay.again([changed]), model(torch.ones(1, 4)))
            assert len(calls) == expected + 5
            model.state_dict()[changed].sub_(0.5)
    assert all("forward" not in vars(module) for module in model.modules())


def test_models_of_the_original_package() -> None:
    modeling = pytest.importorskip("segment_anything.modeling")
    torch.manual_seed(0)
    sam = modeling.Sam(
        modeling.ImageEncoderViT(64, 16, embed_dim=32, depth=2, num_heads=2, out_chans=32),
        modeling.PromptEncoder(32, (4, 4), (64, 64), 16),
        modeling.MaskDecoder(
            transformer_dim=32,
            transformer=modeling.TwoWayTransformer(2, 32, 2, 64),
        ),
    ).eval()
    probe = probe_for(sam)
    assert probe is not None
    with torch.no_grad():
        answers = probe(sam)
    assert answers[0].shape == (8, 3, 16 * 16)
    assert answers[2].shape == (8, 1, 16 * 16)
    effects = measure_effects(sam, ["image_encoder.blocks.1.mlp.lin1.weight"], probe)
    assert min(effects.values()) > 0
