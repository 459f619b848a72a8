"""Makes what python/birkhoff/sample holds of a trained model.

    python benches/accuracy/export_sample.py build/toy-sam

The weights are compressed to 8 bits by birkhoff itself; the scenes are held out, and others than
those of fidelity.py.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from fidelity import SCENES as MEASURED
from scenes import HELD_OUT, draw_scene
from transformers import SamConfig

import birkhoff
from birkhoff.demo import SAMPLE

SCENES = 8


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="folder that train.py has written")
    options = parser.parse_args()
    SAMPLE.mkdir(exist_ok=True)
    summary = birkhoff.compress_file(
        options.model / "model.safetensors", SAMPLE / "model.safetensors", bits=8, overwrite=True
    )
    SamConfig.from_pretrained(options.model).save_pretrained(SAMPLE)
    scenes = [draw_scene(HELD_OUT + MEASURED + i) for i in range(SCENES)]
    images, labels = np.stack([s.image for s in scenes]), np.stack([s.labels for s in scenes])
    np.savez_compressed(SAMPLE / "scenes.npz", images=images, labels=labels)
    print(f"{SAMPLE}: {summary.nbytes:,} bytes of weights")


if __name__ == "__main__":
    main()
