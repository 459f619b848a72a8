"""Synthetic pictures, and what runs models on them."""

import numpy as np
import pytest
import torch

from birkhoff.probes import probe_for
from birkhoff.synthetic import dead_leaves, pink_noise
from test_transformers import sam_config

transformers = pytest.importorskip("transformers")


def test_synthetic_pictures() -> None:
    for draw in (dead_leaves, pink_noise):
        picture = draw(64, np.random.default_rng(3))
        assert picture.shape == (64, 64, 3)
        assert picture.dtype == np.float32
        assert 0 <= picture.min() < 0.2 < 0.8 < picture.max() <= 1
        np.testing.assert_array_equal(picture, draw(64, np.random.default_rng(3)))
        # As in photographs, neighbours are alike.
        grey = picture.mean(-1) - picture.mean()
        assert (grey[:, 1:] * grey[:, :-1]).mean() > 0.6 * grey.var()


def test_probes_of_language_models() -> None:
    config = transformers.BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64,
    )  # fmt: skip
    model = transformers.BertModel(config).eval()
    probe = probe_for(model)
    assert probe is not None
    with torch.no_grad():
        states, pooled = probe(model)
    assert states.shape[-1] == pooled.shape[-1] == 32


def test_thorough_probes_have_more_inputs() -> None:
    sam = transformers.SamModel(sam_config()).eval()
    runs = []
    for thorough in (False, True):
        probe = probe_for(sam, thorough=thorough)
        assert probe is not None
        assert len(probe.pictures) % 2 == 0  # type: ignore[attr-defined]
        runs.append(probe.pictures)  # type: ignore[attr-defined]
    side = runs[0].shape[-1]
    assert len(runs[0]) == 4
    assert runs[1].shape == (64, 3, side, side)
    assert torch.equal(runs[0][0], runs[1][0])
