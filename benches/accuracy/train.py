"""Trains a small transformers `SamModel` on procedurally drawn scenes.

    python benches/accuracy/train.py --out build/toy-sam --steps 8000 --workers 2 --compile

3.7 M parameters, 128 x 128 pixels, patch 8. Hidden matrices are trained by Muon, everything else by
AdamW, both under one cosine schedule over --steps or --minutes. On one machine, the same --seed,
--steps, --workers, --threads and --compile give the same weights. Each worker is a process that
takes its share of the images of a step, and of Muon's matrices. A run that was stopped goes on from
the last checkpoints in --out. The result is `save_pretrained` of the model in fp32 and
`training.json` with its accuracy on held-out scenes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._inductor.config
import torch.distributed
import torch.multiprocessing
from scenes import HELD_OUT, MIN_AREA, SIZE, BoolArray, UInt8Array, cached_scenes
from segmentation import Prompted, pixel_values, predict_masks, prompt_scenes
from torch import Tensor, nn
from torch.nn import functional
from transformers import SamConfig, SamModel

from birkhoff.evaluation.metrics import iou

IMAGES = 8  # a step, of all workers together
POINTS = BOXES = 3  # prompts an image
WARM_UP = 100  # steps
MASK_SIZE = SIZE // 2  # of the decoder's logits
CHECKPOINT_SECONDS = 300
EVALUATION_SECONDS = 600


def build_model(seed: int) -> SamModel:
    """The small SAM, its weights drawn from `seed`."""
    torch.manual_seed(seed)
    config = SamConfig(
        vision_config={
            "hidden_size": 192,
            "output_channels": 128,
            "num_hidden_layers": 6,
            "num_attention_heads": 3,
            "image_size": SIZE,
            "patch_size": 8,
            "window_size": 8,
            "global_attn_indexes": [2, 5],
            "num_pos_feats": 64,
            "initializer_range": 0.02,  # the default is 1e-10
        },
        prompt_encoder_config={"hidden_size": 128, "image_size": SIZE, "patch_size": 8},
        mask_decoder_config={
            "hidden_size": 128,
            "mlp_dim": 512,
            "num_attention_heads": 4,
            "iou_head_hidden_dim": 128,
        },
        attn_implementation="eager",  # the backward pass of SDPA is slower in the decoder
    )
    model = SamModel(config)
    with torch.no_grad():
        # Transformers draws the frequencies with a deviation of hidden_size / 2: no grid of
        # patches resolves them.
        fourier = model.shared_image_embedding.positional_embedding
        fourier.copy_(torch.randn_like(fourier)).requires_grad_(False)
        # Tokens and pixels then begin by attending to equal positions.
        transformer = model.mask_decoder.transformer
        attentions = [transformer.final_attn_token_to_image]
        for layer in transformer.layers:
            attentions += [layer.cross_attn_token_to_image, layer.cross_attn_image_to_token]
        for module in model.mask_decoder.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
        for attention in attentions:
            attention.k_proj.weight.copy_(attention.q_proj.weight)
    return model


def decode(
    model: SamModel, embeddings: Tensor, sparse: Tensor, dense: Tensor
) -> tuple[Tensor, Tensor]:
    """`model.mask_decoder`, returning all four masks (batch, prompts, 4, MASK_SIZE, MASK_SIZE) and
    their predicted IoU: its own forward gives either the first or the other three."""
    decoder = model.mask_decoder
    batch, prompts = sparse.shape[:2]
    outputs = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight]).repeat(
        batch, prompts, 1, 1
    )
    positions = model.get_image_wide_positional_embeddings().repeat(batch * prompts, 1, 1, 1)
    tokens, pixels = decoder.transformer(
        point_embeddings=torch.cat([outputs, sparse], dim=2),
        image_embeddings=(embeddings + dense).repeat_interleave(prompts, 0),
        image_positional_embeddings=positions,
        attention_similarity=None,
    )
    pixels = pixels.transpose(2, 3).reshape(batch * prompts, -1, *embeddings.shape[2:])
    pixels = decoder.activation(decoder.upscale_layer_norm(decoder.upscale_conv1(pixels)))
    pixels = (
        decoder.activation(decoder.upscale_conv2(pixels)).flatten(2).unflatten(0, (batch, prompts))
    )
    weights = torch.stack(
        [mlp(tokens[:, :, 1 + i]) for i, mlp in enumerate(decoder.output_hypernetworks_mlps)], 2
    )
    masks = (weights @ pixels).unflatten(-1, (MASK_SIZE, MASK_SIZE))
    return masks.float(), decoder.iou_prediction_head(tokens[:, :, 0]).float()


def forward(
    model: SamModel, pixels: Tensor, sparse: Tensor, dense: Tensor
) -> tuple[Tensor, Tensor]:
    """Masks and predicted IoU, as from `decode`, in bfloat16 where autocast allows it."""
    with torch.autocast("cpu", torch.bfloat16):
        return decode(model, model.vision_encoder(pixels)[0], sparse, dense)


def augment(
    rng: np.random.Generator, image: UInt8Array, labels: UInt8Array
) -> tuple[UInt8Array, UInt8Array]:
    """One of the eight turns and reflections, the colour channels permuted, each with its own
    gain."""
    turns = int(rng.integers(4))
    image, labels = np.rot90(image, turns), np.rot90(labels, turns)
    if rng.random() < 0.5:
        image, labels = image[:, ::-1], labels[:, ::-1]
    gained = image[:, :, rng.permutation(3)] * rng.uniform(0.8, 1.2, 3)
    return np.clip(gained, 0, 255).astype(np.uint8), labels


def draw_prompts(
    rng: np.random.Generator, labels: UInt8Array
) -> tuple[BoolArray, list[Any], list[Any]]:
    """Masks (POINTS + BOXES, SIZE, SIZE) of shapes of one scene, small ones more often, with POINTS
    points anywhere in the first and BOXES boxes, moved by up to a pixel or 5 %, round the
    others."""
    areas = np.bincount(labels.ravel(), minlength=2).astype(np.float64)
    areas[0] = 0
    odds = np.where(areas >= MIN_AREA, np.maximum(areas, 1) ** -0.35, 0)
    if not odds.any():
        odds[np.argmax(areas)] = 1
    chosen = rng.choice(len(odds), POINTS + BOXES, p=odds / odds.sum())
    masks = labels == chosen[:, None, None]
    points, boxes = [], []
    for mask in masks[:POINTS]:
        pixels = np.flatnonzero(mask)
        pixel = int(pixels[rng.integers(len(pixels))])
        points.append([[pixel % SIZE, pixel // SIZE]])
    for mask in masks[POINTS:]:
        ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        box = np.array([xs[0], ys[0], xs[-1], ys[-1]], np.float32)
        slack = np.maximum(1, 0.05 * np.tile(box[2:] - box[:2], 2))
        boxes.append(np.clip(box + rng.uniform(-slack, slack), 0, SIZE - 1))
    return masks, points, boxes


def training_loss(
    forward_of_step: Callable[[SamModel, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
    model: SamModel,
    rng: np.random.Generator,
    images: UInt8Array,
    labels: UInt8Array,
    progress: float,
) -> tuple[Tensor, Tensor]:
    """The loss of one batch of scenes (n, SIZE, SIZE) and the mean IoU of the first mask, per
    prompt kind."""
    batch = [augment(rng, *scene) for scene in zip(images, labels, strict=True)]
    prompts = [draw_prompts(rng, label_map) for _, label_map in batch]
    coverage = torch.from_numpy(np.stack([masks for masks, _, _ in prompts])).float()
    target = functional.avg_pool2d(coverage, 2)[
        :, :, None
    ]  # (n, prompts, 1, MASK_SIZE, MASK_SIZE), in 0..1
    points = torch.tensor(np.array([points for _, points, _ in prompts]), dtype=torch.float32)
    boxes = torch.tensor(np.array([boxes for _, _, boxes in prompts]), dtype=torch.float32)

    # Outside of autocast: the encoding of a position needs more than the 8 bits of bfloat16.
    encode = model.prompt_encoder
    of_points, dense = encode(points, torch.ones(points.shape[:3], dtype=torch.int64), None, None)
    of_boxes, _ = encode(None, None, boxes, None)
    sparse = torch.cat([of_points, of_boxes], dim=1)  # two tokens a prompt, either kind
    pixels = pixel_values(np.stack([image for image, _ in batch]))
    logits, predicted_iou = forward_of_step(model, pixels, sparse, dense)

    pixelwise = functional.binary_cross_entropy_with_logits(
        logits, target.expand_as(logits), reduction="none"
    )
    share = target.mean((3, 4), keepdim=True)
    balanced = (pixelwise * (target / (2 * share) + (1 - target) / (2 * (1 - share)))).mean((3, 4))
    balance = max(0.0, 1 - 4 * progress)
    cross_entropy = balance * balanced + (1 - balance) * pixelwise.mean((3, 4))
    probability = logits.sigmoid()
    overlap, total = (
        (probability * target).sum((3, 4)),
        probability.sum((3, 4)) + target.sum((3, 4)),
    )
    dice = 1 - (2 * overlap + 1) / (total + 1)
    per_mask = 2 * cross_entropy + dice  # (n, prompts, 4)

    with torch.no_grad():
        found, wanted = logits > 0, target > 0.5
        true_iou = (found & wanted).sum((3, 4)) / (found | wanted).sum((3, 4)).clamp(min=1)
    loss = per_mask[:, :, 0].mean() + 0.25 * per_mask[:, :, 1:].min(2).values.mean()
    loss = loss + 0.1 * functional.mse_loss(predicted_iou, true_iou)
    return loss, torch.stack([true_iou[:, :POINTS, 0].mean(), true_iou[:, POINTS:, 0].mean()])


def hidden_matrices(model: SamModel, workers: int) -> list[list[nn.Parameter]]:
    """The matrices of hidden layers, in one share for each worker."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    matrices = sorted((layer.weight for layer in layers), key=nn.Parameter.numel)
    return [matrices[worker::workers] for worker in range(workers)]


def build_optimizers(
    model: SamModel, learning_rate: float, hidden: list[list[nn.Parameter]], rank: int
) -> list[torch.optim.Optimizer]:
    """Muon for a worker's share of the matrices of hidden layers, AdamW for the rest (embeddings,
    convolutions, biases, norms)."""
    chosen = {id(p) for share in hidden for p in share}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in chosen]
    decayed, free = [p for p in others if p.ndim > 1], [p for p in others if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": free, "weight_decay": 0.0}]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98))
    ]
    if hidden:
        optimizers.append(
            torch.optim.Muon(
                hidden[rank],
                lr=2 * learning_rate,
                weight_decay=0.05,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    return optimizers


@torch.no_grad()
def exchange(hidden: list[list[nn.Parameter]]) -> None:
    """Gives every worker the matrices that the others have updated."""
    for worker, share in enumerate(hidden):
        flat = torch.cat([p.flatten() for p in share])
        torch.distributed.broadcast(flat, worker)
        for p, part in zip(share, flat.split([p.numel() for p in share]), strict=True):
            p.copy_(part.view_as(p))


def accuracy(model: SamModel, scenes: Prompted) -> dict[str, float]:
    """Mean and median IoU with the visible masks for points and boxes."""
    model.eval()
    result = {}
    for mode, masks in predict_masks(model, scenes).items():
        overlaps = iou(masks, scenes.masks)
        result[f"{mode}_miou"] = round(float(np.mean(overlaps)), 4)
        result[f"{mode}_median_iou"] = round(float(np.median(overlaps)), 4)
    model.train()
    return result


def average_over_workers(parameters: list[nn.Parameter], extra: list[float]) -> list[float]:
    """Averages the gradients in place, and returns the averages of `extra`."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients] + [torch.tensor(extra)])
    torch.distributed.all_reduce(flat)
    flat /= torch.distributed.get_world_size()
    for gradient, part in zip(
        gradients, flat.split([g.numel() for g in gradients] + [len(extra)]), strict=False
    ):
        gradient.copy_(part.view_as(gradient))
    return [float(x) for x in flat[-len(extra) :]]


def work(rank: int, options: argparse.Namespace, port: int) -> None:
    """One worker."""
    # Of its own: workers that share kernels read what another has half written.
    with tempfile.TemporaryDirectory(prefix="inductor-") as kernels:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = kernels
        train(rank, options, port)


def train(rank: int, options: argparse.Namespace, port: int) -> None:
    """One worker's training; worker 0 writes the log and the result."""
    torch.set_num_threads(options.threads)
    if options.workers > 1:
        address = f"tcp://127.0.0.1:{port}"
        torch.distributed.init_process_group(
            "gloo", init_method=address, rank=rank, world_size=options.workers
        )
    images, labels = cached_scenes(0, options.scenes, options.cache)
    held_out = prompt_scenes(*cached_scenes(HELD_OUT, 300, options.cache), MIN_AREA)
    a_fifth = Prompted(*(array[::5] for array in held_out))
    model = build_model(options.seed).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    hidden = [] if options.adamw else hidden_matrices(model, options.workers)
    optimizers = build_optimizers(model, options.learning_rate, hidden, rank)
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    forward_of_step = forward
    if options.compile:
        # Vectors of 512 bits give a wrong gradient of the decoder's layer norm (torch 2.15).
        torch._inductor.config.cpp.simdlen = 256
        forward_of_step = torch.compile(forward)
    checkpoint = options.out / f"checkpoint-{rank}.pt"
    step, before, progress = 0, 0.0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, before = state["step"], state["seconds"]

    started = time.monotonic()
    seconds = checkpointed = evaluated = before
    averages, averaged = np.zeros(3), 0
    while progress < 1:
        progress = (step + 1) / options.steps if options.steps else seconds / (60 * options.minutes)
        rng = np.random.default_rng([options.seed, step, rank])
        mine = rng.integers(options.scenes, size=IMAGES // options.workers)
        loss, overlaps = training_loss(
            forward_of_step, model, rng, images[mine], labels[mine], min(progress, 1)
        )
        loss.backward()
        seconds = before + time.monotonic() - started
        report = [seconds, step, float(loss.detach()), *overlaps.tolist()]
        if options.workers > 1:
            report = average_over_workers(parameters, report)
        seconds = report[0]  # of which all workers now think alike
        if report[1] != step or not math.isfinite(report[2]):
            raise SystemExit(f"step {step}: the loss is not finite, or a worker is at another step")
        nn.utils.clip_grad_norm_(parameters, 1.0)
        factor = min(1, (step + 1) / WARM_UP) * (0.5 + 0.5 * math.cos(math.pi * min(progress, 1)))
        for optimizer, groups in zip(optimizers, rates, strict=True):
            for group, rate in zip(optimizer.param_groups, groups, strict=True):
                group["lr"] = rate * factor
            optimizer.step()
        model.zero_grad()
        if options.workers > 1:
            exchange(hidden)
        averaged = min(averaged + 1, 100)
        averages += (np.array(report[2:]) - averages) / averaged
        step += 1
        if rank == 0 and step % 100 == 0:
            words = "step {} {:.1f} min, loss {:.4f}, IoU of points {:.3f}, boxes {:.3f}"
            print(words.format(step, seconds / 60, *averages), flush=True)
        if seconds - checkpointed > CHECKPOINT_SECONDS:
            checkpointed = seconds
            saved = {
                "model": model.state_dict(),
                "optimizers": [o.state_dict() for o in optimizers],
                "step": step,
                "seconds": seconds,
            }
            torch.save(saved, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").rename(checkpoint)
        if rank == 0 and seconds - evaluated > EVALUATION_SECONDS and progress < 1:
            evaluated = seconds
            print(f"step {step} held out:", accuracy(model, a_fifth), flush=True)
    if rank == 0:
        model.save_pretrained(options.out)
        result = accuracy(model, held_out) | {"steps": step, "minutes": round(seconds / 60, 1)}
        result |= {key: getattr(options, key) for key in ("seed", "scenes", "workers", "compile")}
        (options.out / "training.json").write_text(json.dumps(result, indent=1) + "\n")
        print("done:", result, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the checkpoint and the trained model"
    )
    parser.add_argument(
        "--cache", type=Path, help="folder for the drawn scenes (default: OUT/scenes)"
    )
    parser.add_argument("--minutes", type=float, default=55, help="length of the training")
    parser.add_argument("--steps", type=int, help="length in steps instead of minutes")
    parser.add_argument("--scenes", type=int, default=24000, help="how many scenes to train on")
    parser.add_argument("--workers", type=int, default=1, choices=[1, 2, 4, 8], help="processes")
    parser.add_argument("--threads", type=int, default=1, help="threads of each worker")
    parser.add_argument("--learning-rate", type=float, default=8e-4)
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile: a third faster, needs a C++ compiler"
    )
    parser.add_argument("--adamw", action="store_true", help="no Muon")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.cache = options.cache or options.out / "scenes"
    options.out.mkdir(parents=True, exist_ok=True)
    cached_scenes(0, options.scenes, options.cache)
    cached_scenes(HELD_OUT, 300, options.cache)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    if options.workers == 1:
        work(0, options, port)
    else:
        torch.multiprocessing.spawn(work, (options, port), nprocs=options.workers)


if __name__ == "__main__":
    main()
