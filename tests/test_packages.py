"""Compressed models in the packages that they come from: small encoders, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import nn

import birkhoff
from birkhoff.nn import HyperConv2d, HyperLinear

# Those of the packages and of what they depend on.
pytestmark = pytest.mark.filterwarnings("ignore")


def installed(name: str) -> Any:
    """A package, or else a skipped test."""
    return pytest.importorskip(
        name, reason=f"{name} is not installed; pip install 'birkhoff[packages]'"
    )


def sam(modeling: Any, encoder: nn.Module, **decoder_options: Any) -> nn.Module:
    """The model of an image encoder with 256 channels, of a package after segment-anything."""
    size: int = encoder.img_size  # type: ignore[assignment]
    transformer = modeling.TwoWayTransformer(depth=2, embedding_dim=256, mlp_dim=128, num_heads=8)
    decoder = modeling.MaskDecoderHQ if decoder_options else modeling.MaskDecoder
    model: nn.Module = modeling.Sam(
        image_encoder=encoder,
        prompt_encoder=modeling.PromptEncoder(
            embed_dim=256,
            image_embedding_size=(size // 16, size // 16),
            input_image_size=(size, size),
            mask_in_chans=16,
        ),
        mask_decoder=decoder(transformer_dim=256, transformer=transformer, **decoder_options),
    )
    return model.eval()


def vit(modeling: Any) -> Any:
    encoder = modeling.ImageEncoderViT(
        img_size=128,
        embed_dim=64,
        depth=2,
        num_heads=2,
        use_rel_pos=True,
        window_size=3,
        global_attn_indexes=(1,),
    )
    return encoder


def tiny_vit(modeling: Any) -> Any:
    """It takes images of 1024 x 1024 only."""
    return modeling.TinyViT(
        img_size=1024,
        embed_dims=[32, 32, 160, 320],
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 5, 10],
        drop_path_rate=0.0,
        num_classes=64,
    )


def sam_vit() -> nn.Module:
    modeling = installed("segment_anything").modeling
    return sam(modeling, vit(modeling))


def sam_hq_vit() -> nn.Module:
    modeling = installed("segment_anything_hq").modeling
    return sam(modeling, vit(modeling), vit_dim=64)


def sam_hq_tiny() -> nn.Module:
    modeling = installed("segment_anything_hq").modeling
    return sam(modeling, tiny_vit(modeling), vit_dim=160)


def mobile_sam() -> nn.Module:
    modeling = installed("mobile_sam").modeling
    return sam(modeling, tiny_vit(modeling))


def edge_sam() -> nn.Module:
    modeling = installed("x_segment_anything").modeling
    return sam(modeling, modeling.RepViT(arch="m1", img_size=256))


def sam2() -> nn.Module:
    """Its predictor takes images of 1024 x 1024 only."""
    installed("sam2")
    overrides = {
        "image_encoder.trunk.embed_dim": 16,
        "image_encoder.trunk.stages": [1, 1, 2, 1],
        "image_encoder.trunk.global_att_blocks": [3],
        "image_encoder.neck.backbone_channel_list": [128, 64, 32, 16],
    }
    model: nn.Module = import_module("sam2.build_sam").build_sam2(
        "configs/sam2.1/sam2.1_hiera_t.yaml",
        device="cpu",
        hydra_overrides_extra=[f"++model.{key}={value}" for key, value in overrides.items()],
    )
    return model


MODELS: list[tuple[str, Callable[[], nn.Module]]] = [
    ("segment_anything", sam_vit),
    ("segment_anything_hq", sam_hq_vit),
    ("segment_anything_hq", sam_hq_tiny),
    ("mobile_sam", mobile_sam),
    ("x_segment_anything", edge_sam),
    ("sam2.sam2_image_predictor", sam2),
]


def logits_of(module: str, model: nn.Module, image: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The mask logits of a point, from the predictor of a package."""
    predictors = import_module(module)
    kind = "SAM2ImagePredictor" if module.startswith("sam2") else "SamPredictor"
    predictor = getattr(predictors, kind)(model)
    predictor.set_image(image)
    logits: NDArray[np.float32] = predictor.predict(
        np.array([[20, 30]]), np.array([1]), return_logits=True
    )[0]
    return logits


@pytest.fixture
def image() -> NDArray[np.uint8]:
    return np.random.default_rng(1).integers(0, 256, (48, 64, 3), np.uint8)


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Adds noise to tensors of one value: positions, norms and biases are to matter, too."""
    for tensor in model.state_dict().values():
        if tensor.is_floating_point() and torch.all(tensor == tensor.flatten()[0]):
            tensor.add_(0.02 * torch.randn_like(tensor))


@pytest.mark.parametrize(("module", "build"), MODELS, ids=[build.__name__ for _, build in MODELS])
def test_predictor_gives_what_it_gives_with_decoded_weights(
    module: str, build: Callable[[], nn.Module], tmp_path: Path, image: NDArray[np.uint8]
) -> None:
    original, compressed, decoded = (
        tmp_path / name for name in ("model.pth", "model.safetensors", "decoded.safetensors")
    )
    torch.manual_seed(2)
    reference = build()
    randomize(reference)
    torch.save(reference.state_dict(), original)
    birkhoff.compress_file(original, compressed)
    birkhoff.decompress_file(compressed, decoded)
    reference.load_state_dict(load_file(decoded))
    # TinyViT computes its attention biases in eval().
    expected = logits_of(module, reference.eval(), image)

    model = birkhoff.load(compressed, build, precision="highest")
    kinds = [type(layer) for layer in model.modules()]
    assert kinds.count(HyperLinear) > 20
    assert HyperConv2d in kinds
    logits = logits_of(module, model, image)
    assert logits.shape == expected.shape
    assert np.linalg.norm(logits - expected) <= 1e-5 * np.linalg.norm(expected)

    again = birkhoff.compress(build(), precision="highest")
    again.load_state_dict(model.state_dict())
    assert np.array_equal(logits_of(module, again.eval(), image), logits)


@pytest.mark.parametrize("build", [sam_vit, mobile_sam])
def test_automatic_mask_generator(build: Callable[[], nn.Module], image: NDArray[np.uint8]) -> None:
    torch.manual_seed(3)
    model = birkhoff.compress(build())
    module = import_module("segment_anything" if build is sam_vit else "mobile_sam")
    # Thresholds are off, as random weights would pass none.
    off = {"pred_iou_thresh": 0.0, "stability_score_thresh": 0.0, "box_nms_thresh": 1.0}
    generator = module.SamAutomaticMaskGenerator(model, points_per_side=2, **off)
    masks = generator.generate(image)
    assert masks
    assert all(mask["segmentation"].shape == image.shape[:2] for mask in masks)
