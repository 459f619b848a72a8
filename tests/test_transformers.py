"""Compressed models of Hugging Face transformers, small and with random weights."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import birkhoff
from birkhoff.nn import CodedParameter, HyperConv2d, HyperLinear
from birkhoff.transformers import BirkhoffConfig, BirkhoffQuantizer

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")


def sam_config() -> Any:
    return transformers.SamConfig(
        vision_config={
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 64,
            "patch_size": 16,
            "output_channels": 32,
            "mlp_dim": 128,
            "window_size": 2,
            "global_attn_indexes": [1],
            "num_pos_feats": 16,
            "initializer_range": 0.02,
        },
        prompt_encoder_config={"hidden_size": 32, "image_size": 64, "mask_input_channels": 4},
        mask_decoder_config={"hidden_size": 32, "mlp_dim": 64, "iou_head_hidden_dim": 32},
    )


@pytest.fixture
def sam() -> Any:
    torch.manual_seed(5)
    return transformers.SamModel(sam_config()).eval()


@pytest.fixture
def folder(sam: Any, tmp_path: Path) -> Path:
    sam.save_pretrained(tmp_path / "original")
    return tmp_path / "original"


def masks(model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(6)
    image = torch.randn(1, 3, 64, 64, generator=generator)
    with torch.inference_mode():
        output = model(pixel_values=image, input_points=torch.tensor([[[[20.0, 30.0]]]]))
    result: Tensor = output.pred_masks
    return result


def same(a: Any, b: Any) -> bool:
    """Whether the states are equal, and the masks but for the order of additions."""
    first, second = a.state_dict(), b.state_dict()
    if set(first) != set(second) or any(not torch.equal(first[k], second[k]) for k in first):
        return False
    return bool((masks(a) - masks(b)).norm() <= 1e-3 * masks(b).norm())


def names_of(model: nn.Module, kind: type[nn.Module]) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, kind)}


def test_compress_on_the_fly_save_and_load(
    sam: Any, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = transformers.SamModel.from_pretrained(
        folder, quantization_config=BirkhoffConfig(bits=4, precision="highest")
    )
    assert names_of(model, HyperLinear)
    assert names_of(model, HyperConv2d)
    assert same(birkhoff.compress(sam, 4, precision="highest"), model)

    model.save_pretrained(tmp_path / "compressed")
    config = json.loads((tmp_path / "compressed" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "birkhoff"
    sizes = [
        (path / "model.safetensors").stat().st_size for path in (folder, tmp_path / "compressed")
    ]
    assert sizes[1] < sizes[0] / 2

    transformers.utils.logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        loaded, info = transformers.SamModel.from_pretrained(
            tmp_path / "compressed", output_loading_info=True
        )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not caplog.records
    assert names_of(loaded, CodedParameter) == names_of(model, CodedParameter)
    assert same(loaded, model)
    # It is also a file of birkhoff itself.
    path = tmp_path / "compressed" / "model.safetensors"
    assert birkhoff.verify_file(path, folder / "model.safetensors").ok
    assert same(birkhoff.load(path, lambda: transformers.SamModel(sam_config())), model)
    birkhoff.save(model, tmp_path / "model.safetensors")
    a, b = birkhoff.open(path), birkhoff.open(tmp_path / "model.safetensors")
    assert a.settings == b.settings
    # save_pretrained leaves out tied tensors.
    assert set(b) - set(a) == {"prompt_encoder.shared_embedding.positional_embedding"}
    assert all((a[name] == b[name]).all() for name in a)
    assert path.stat().st_size < 1.01 * (tmp_path / "model.safetensors").stat().st_size
    # Once more, from what was loaded.
    loaded.save_pretrained(tmp_path / "again")
    again = transformers.SamModel.from_pretrained(tmp_path / "again")
    assert same(again, model)


def test_folder_with_a_file_of_the_command_line(folder: Path, tmp_path: Path) -> None:
    compressed = tmp_path / "compressed"
    compressed.mkdir()
    birkhoff.compress_file(folder, compressed / "model.safetensors", bits=4)
    config = json.loads((folder / "config.json").read_text())
    (compressed / "config.json").write_text(json.dumps(config))
    model = transformers.SamModel.from_pretrained(compressed, quantization_config=BirkhoffConfig())
    config["quantization_config"] = {"quant_method": "birkhoff"}
    (compressed / "config.json").write_text(json.dumps(config))
    named = transformers.SamModel.from_pretrained(compressed)
    direct = birkhoff.load(
        compressed / "model.safetensors", lambda: transformers.SamModel(sam_config())
    )
    assert same(model, direct)
    assert same(named, direct)


def sam_hq() -> Any:
    config = sam_config()
    parts = (config.vision_config, config.prompt_encoder_config, config.mask_decoder_config)
    vision, prompt, decoder = (part.to_dict() for part in parts)
    return transformers.SamHQModel(
        transformers.SamHQConfig(
            vision_config=vision,
            prompt_encoder_config=prompt,
            mask_decoder_config=decoder | {"vit_dim": 64},
        )
    )


def sam2() -> Any:
    backbone = transformers.Sam2HieraDetConfig(
        hidden_size=32,
        num_attention_heads=1,
        image_size=[128, 128],
        window_positional_embedding_background_size=[2, 2],
        blocks_per_stage=[1, 1, 2, 1],
        embed_dim_per_stage=[32, 64, 128, 256],
        num_attention_heads_per_stage=[1, 2, 4, 8],
        window_size_per_stage=[8, 4, 8, 4],
        global_attention_blocks=[3],
    )
    vision = transformers.Sam2VisionConfig(
        backbone_config=backbone,
        backbone_channel_list=[256, 128, 64, 32],
        backbone_feature_sizes=[[32, 32], [16, 16], [8, 8]],
        fpn_hidden_size=64,
    )
    prompt = {"hidden_size": 64, "image_size": 128, "patch_size": 16, "mask_input_channels": 4}
    decoder = {
        "hidden_size": 64,
        "mlp_dim": 128,
        "iou_head_hidden_dim": 64,
        "num_attention_heads": 2,
    }
    return transformers.Sam2Model(
        transformers.Sam2Config(
            vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder
        )
    )


def sam3() -> Any:
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    backbone = {
        "model_type": "sam3_vit_model",
        **sizes,
        "num_hidden_layers": 2,
        "image_size": 56,
        "patch_size": 14,
        "pretrain_image_size": 56,
        "window_size": 2,
        "global_attn_indexes": [1],
    }
    text = {
        **sizes,
        "vocab_size": 128,
        "projection_dim": 32,
        "num_hidden_layers": 2,
        "eos_token_id": 2,
        "bos_token_id": 1,
        "pad_token_id": 0,
    }
    return transformers.Sam3Model(
        transformers.Sam3Config(
            vision_config={
                "backbone_config": backbone,
                "fpn_hidden_size": 32,
                "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
            },
            text_config=text,
            geometry_encoder_config={**sizes, "num_layers": 1},
            detr_encoder_config={**sizes, "num_layers": 1},
            detr_decoder_config={**sizes, "num_layers": 1, "num_queries": 8},
            mask_decoder_config={"hidden_size": 32, "num_attention_heads": 2},
        )
    )


def edge_tam() -> Any:
    pytest.importorskip("timm")
    prompt = {"hidden_size": 256, "image_size": 128}
    return transformers.EdgeTamModel(
        transformers.EdgeTamConfig(
            vision_config={
                "image_size": 128,
                "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
            },
            prompt_encoder_config=prompt,
            mask_decoder_config={"mlp_dim": 128},
        )
    )


@pytest.mark.parametrize("make", [sam_hq, sam2, sam3, edge_tam])
def test_other_models(make: Callable[[], Any], tmp_path: Path) -> None:
    model = make().eval()
    model.save_pretrained(tmp_path / "original")
    compressed = type(model).from_pretrained(
        tmp_path / "original", quantization_config=BirkhoffConfig(bits=4)
    )
    compressed.save_pretrained(tmp_path / "compressed")
    loaded, info = type(model).from_pretrained(tmp_path / "compressed", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert birkhoff.verify_file(
        tmp_path / "compressed" / "model.safetensors", tmp_path / "original" / "model.safetensors"
    ).ok
    birkhoff.save(loaded, tmp_path / "model.safetensors")
    direct = birkhoff.load(tmp_path / "model.safetensors", lambda: type(model)(model.config))
    expected = compressed.state_dict()
    for other in (loaded, direct):
        state = other.state_dict()
        assert set(state) == set(expected)
        assert all(torch.equal(state[name], expected[name]) for name in expected)
        assert names_of(other, HyperLinear) == names_of(compressed, HyperLinear)


def test_half(folder: Path, tmp_path: Path) -> None:
    model = transformers.SamModel.from_pretrained(
        folder, quantization_config=BirkhoffConfig(bits=4), dtype=torch.bfloat16
    )
    assert masks_of_half(model).dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "half")
    loaded = transformers.SamModel.from_pretrained(tmp_path / "half", dtype="auto")
    first, second = model.state_dict(), loaded.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert masks_of_half(loaded).dtype == torch.bfloat16


def masks_of_half(model: Any) -> Tensor:
    image = torch.ones(1, 3, 64, 64, dtype=torch.bfloat16)
    with torch.inference_mode():
        result: Tensor = model(pixel_values=image).pred_masks
    return result


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="7"):
        BirkhoffConfig(bits=7)
    with pytest.raises(ValueError, match="on the CPU, not on cuda"):
        BirkhoffQuantizer(BirkhoffConfig()).validate_environment(device_map="cuda")


def test_another_architecture(folder: Path, tmp_path: Path) -> None:
    model = transformers.SamModel.from_pretrained(folder, quantization_config=BirkhoffConfig())
    model.save_pretrained(tmp_path / "compressed")
    config = json.loads((tmp_path / "compressed" / "config.json").read_text())
    config["vision_config"]["mlp_dim"] = 256
    (tmp_path / "compressed" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"mlp\.lin1\.weight\.codes .* another model"):
        transformers.SamModel.from_pretrained(tmp_path / "compressed")


def test_importing_birkhoff_imports_neither_torch_nor_transformers() -> None:
    import subprocess
    import sys

    code = (
        "import sys, birkhoff; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_few_weights_are_uncompressed_at_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []

    def place(model: nn.Module, parameters: dict[str, CodedParameter], *others: Any) -> None:
        sizes.append(sum(tensor.nbytes for tensor in model.state_dict().values()))
        birkhoff.nn.placement.place(model, parameters, *others)

    monkeypatch.setattr("birkhoff.transformers.place", place)
    transformers.SamModel.from_pretrained(folder, quantization_config=BirkhoffConfig())
    assert sizes[0] < 0.1 * (folder / "model.safetensors").stat().st_size


def test_weights_that_are_not_finite_or_do_not_fit(sam: Any, tmp_path: Path) -> None:
    weight = sam.vision_encoder.layers[0].mlp.lin1.weight
    with torch.no_grad():
        weight[1, 1] = torch.nan
    sam.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^tensor .*mlp\.lin1\.weight.* NaN .*--skip$"):
        transformers.SamModel.from_pretrained(tmp_path, quantization_config=BirkhoffConfig())
    config = sam_config()
    config.vision_config.mlp_dim = 64
    with pytest.raises(RuntimeError, match="mismatch"):
        transformers.SamModel.from_pretrained(
            tmp_path, config=config, quantization_config=BirkhoffConfig()
        )


def test_mask_generation_pipeline(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    model = transformers.SamModel.from_pretrained(folder, quantization_config=BirkhoffConfig())
    processor = transformers.SamImageProcessor(
        size={"longest_edge": 64},
        pad_size={"height": 64, "width": 64},
        mask_size={"longest_edge": 16},
        mask_pad_size={"height": 16, "width": 16},
    )
    for part in (model, processor):
        part.save_pretrained(tmp_path / "compressed")
    generator = transformers.pipeline("mask-generation", model=str(tmp_path / "compressed"))
    assert names_of(generator.model, HyperLinear)
    from PIL import Image

    image = np.random.default_rng(7).integers(0, 256, (48, 64, 3), np.uint8)
    # Thresholds are off, as random weights would pass none.
    output = generator(
        Image.fromarray(image),
        points_per_batch=64,
        pred_iou_thresh=-1e9,
        stability_score_thresh=-1.0,
        crops_nms_thresh=1.0,
    )
    assert output["masks"]
    assert all(np.shape(mask) == (48, 64) for mask in output["masks"])
