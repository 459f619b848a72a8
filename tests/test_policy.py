"""Bits for the tensors of the Segment Anything family, and the file sizes that follow."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

import birkhoff
from birkhoff import _core
from birkhoff.checkpoint import Checkpoint, Tensor
from birkhoff.plan import Coded, Item, Stored, best_matrix_view, make_plan
from birkhoff.policy import choose_policy

ARCHITECTURES = Path(__file__).parent / "architectures"
ITEM_SIZE = {"F32": 4, "F16": 2, "I64": 8, "BOOL": 1}


def zeros(name: str, dtype: str, *shape: int) -> Tensor:
    nbytes = ITEM_SIZE[dtype] * math.prod(shape)
    return Tensor(name, dtype, shape, lambda: np.zeros(nbytes, np.uint8))


def load(name: str) -> list[Tensor]:
    """The tensors of an architecture, all zeros."""
    tensors = []
    for line in (ARCHITECTURES / f"{name}.txt").read_text().splitlines()[1:]:
        tensor, dtype, sizes = line.split()
        shape = () if sizes == "scalar" else tuple(map(int, sizes.split("x")))
        tensors.append(zeros(tensor, dtype, *shape))
    return tensors


def plan_for(name: str, bits: int = 4, codec: str = "shift") -> dict[str, Item]:
    tensors = load(name)
    plan = make_plan(tensors, choose_policy(tensors, bits=bits, codec=codec))
    return {item.tensor.name: item for item in plan}


@pytest.mark.parametrize(
    ("name", "ratio"),
    [
        ("sam_vit_b", 7.2),
        ("sam_vit_l", 7.5),
        ("sam_vit_h", 7.6),
        ("transformers_sam_vit_b", 7.2),
        ("sam2_hiera_base_plus", 7.3),
        ("mobile_sam", 6.0),
        ("edge_sam", 6.0),
        ("efficient_sam_ti", 6.2),
    ],
)
def test_whole_models_at_four_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, ratio: float
) -> None:
    # Sizes do not depend on values, and zeros are quick to encode.
    checkpoint = Checkpoint(tmp_path / name, load(name), [])
    monkeypatch.setattr("birkhoff.compression.open_checkpoint", lambda path: checkpoint)
    output = tmp_path / "model.safetensors"
    summary = birkhoff.compress_file(checkpoint.path, output)
    output.unlink()
    assert summary.ratio >= ratio


def bits_of(item: Item) -> int | str:
    return item.bits if isinstance(item, Coded) else "stored"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "sam_vit_b",
            {
                "image_encoder.blocks.3.attn.qkv.weight": 4,
                "image_encoder.blocks.3.mlp.lin1.weight": 4,
                "image_encoder.blocks.2.attn.rel_pos_h": 8,
                "image_encoder.pos_embed": 6,
                "image_encoder.patch_embed.proj.weight": 8,
                "image_encoder.neck.2.weight": 8,
                "mask_decoder.transformer.layers.1.mlp.lin1.weight": 8,
                "mask_decoder.output_upscaling.0.weight": 8,
                "mask_decoder.output_upscaling.3.weight": "stored",
                "image_encoder.blocks.3.norm1.weight": "stored",
            },
        ),
        (
            "transformers_sam_vit_b",
            {
                "vision_encoder.layers.3.attn.qkv.weight": 4,
                "vision_encoder.pos_embed": 6,
                "vision_encoder.neck.conv2.weight": 8,
                "mask_decoder.upscale_conv1.weight": 8,
                "mask_decoder.upscale_conv2.weight": "stored",
            },
        ),
        ("sam_vit_h", {"image_encoder.pos_embed": 8}),
        (
            "sam2_hiera_base_plus",
            {
                "image_encoder.trunk.blocks.20.mlp.layers.0.weight": 4,
                "image_encoder.neck.convs.0.conv.weight": 8,
                "memory_attention.layers.0.linear1.weight": 4,
                "sam_mask_decoder.transformer.layers.0.mlp.layers.0.weight": 8,
                "sam_mask_decoder.output_upscaling.3.weight": "stored",
            },
        ),
        (
            "mobile_sam",
            {
                "image_encoder.layers.2.blocks.0.attn.qkv.weight": 4,
                "image_encoder.neck.2.weight": 8,
                "mask_decoder.transformer.layers.0.cross_attn_image_to_token.q_proj.weight": 8,
                "mask_decoder.transformer.final_attn_token_to_image.k_proj.weight": 8,
                "mask_decoder.transformer.layers.0.self_attn.q_proj.weight": 5,
                "mask_decoder.transformer.layers.0.self_attn.v_proj.weight": 4,
                "mask_decoder.transformer.layers.0.mlp.lin1.weight": 5,
                "mask_decoder.output_hypernetworks_mlps.0.layers.0.weight": 5,
                "mask_decoder.output_upscaling.0.weight": 8,
                "mask_decoder.output_upscaling.3.weight": "stored",
            },
        ),
    ],
)
def test_the_table_decides_by_name(name: str, expected: dict[str, int | str]) -> None:
    plan = plan_for(name)
    assert {tensor: bits_of(plan[tensor]) for tensor in expected} == expected


@pytest.mark.parametrize("codec", ["shift", "winding"])
def test_every_rate_of_a_plan_is_one_of_the_codec(codec: str) -> None:
    for bits in _core.rates(codec):
        for name in ("sam_vit_b", "mobile_sam"):
            for item in plan_for(name, bits, codec).values():
                assert bits_of(item) in [*_core.rates(codec), "stored"]


def test_small_matrices_of_an_unknown_model_get_eight_bits() -> None:
    tensors = [zeros(f"layers.{i}.weight", "F32", 512, 512) for i in range(20)]
    tensors += [zeros("head.weight", "F32", 64, 512), zeros("table", "F32", 128, 512)]
    plan = make_plan(tensors, choose_policy(tensors, bits=3, codec="shift"))
    assert [bits_of(item) for item in plan] == [3] * 20 + [8, 8]


@pytest.mark.parametrize(
    ("shape", "rows", "cols"),
    [
        ((96, 40), 96, 40),
        ((256, 256, 3, 3), 256, 2304),
        ((1, 64, 64, 768), 4096, 768),
        ((256, 64, 2, 2), 256, 256),
        ((32, 32, 64), 32, 2048),
    ],
)
def test_the_smaller_matrix_view_is_taken(shape: tuple[int, ...], rows: int, cols: int) -> None:
    assert best_matrix_view(shape, 4, "shift")[1:] == (rows, cols)


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([1.0, 0.1, 3e-5], "F16"),
        ([0.0, 0.0], "F16"),
        ([65504.0], "F16"),
        ([65536.0, 1.0], "F32"),
        ([1e-7, 2e-8], "F32"),
        ([np.nan, 1.0], "F32"),
        ([np.inf, 1.0], "F32"),
    ],
)
def test_float16_is_used_only_where_it_keeps_the_values(values: list[float], dtype: str) -> None:
    data = np.array(values, np.float32)
    tensor = Tensor("bias", "F32", data.shape, lambda: data.view(np.uint8))
    [item] = make_plan([tensor], choose_policy([tensor], bits=4, codec="shift"))
    assert item == Stored(tensor, dtype)


def test_tied_tensors_stay_tied_unless_one_of_them_is_skipped() -> None:
    first = zeros("first", "F32", 64, 64)
    tied = Tensor("tied", "F32", (64, 64), first.read, tied_to="first")
    policy = choose_policy([first, tied], bits=4, codec="shift")

    def kinds(*skip: str) -> list[str]:
        return [type(item).__name__ for item in make_plan([first, tied], policy, skip=skip)]

    assert kinds() == ["Coded", "Tied"]
    assert kinds("tied") == ["Coded", "Stored"]
    assert kinds("first") == ["Stored", "Coded"]
    assert kinds("first", "tied") == ["Stored", "Tied"]
