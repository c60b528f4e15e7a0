"""What a LoRA adds to a forward, beside what peft adds to diffusers'; what changing the file takes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from models.z_image.bench import twins
from models.z_image.bench.blocks import real_block
from models.z_image.bench.stand import Stand
from models.z_image.bench.twins import PACKED
from models.z_image.config import TransformerConfig
from models.z_image.keys import diffusers_names
from models.z_image.loader import load_transformer
from models.z_image.lora import LoraSet

RANK = 32
_DEMO = Path(__file__).parents[1] / "demo" / "transformer.safetensors"
_DEMO_RANK = 16
_EFFECT = 0.5  # of each matrix: what a layer adds is a quarter of what it gives
# A call of a block of real width takes a second or more.
_REPEATS = 5


def on_cpu(stand: Stand, config: TransformerConfig | None = None, demo: Path = _DEMO) -> None:
    """One block at 1024 tokens with and without, then the demo."""
    both = twins.make(config or real_block(), torch.bfloat16, stand.device)
    # 640 x 384 pixels are 960 image tokens, with 64 of the caption 1024.
    _overhead(stand, both, width=640, height=384, caption=64, row="1024 tokens")
    _swap(stand, load_transformer(demo, torch.float32))


def on_gpu(stand: Stand, config: TransformerConfig | None = None, side: int = 1024) -> None:
    """The whole network."""
    both = twins.make(config or TransformerConfig(), torch.bfloat16, stand.device)
    _overhead(stand, both, width=side, height=side, caption=100, row=f"{side}x{side}")


def write(path: Path, model: nn.Module, rank: int, seed: int = 0) -> Path:
    """A LoRA on attention and feed-forward of all blocks, in the ecosystem's names and in bf16; returns the path."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, linear in model.named_modules():
        if not PACKED.fullmatch(name) or not isinstance(linear, nn.Linear):
            continue
        parts = diffusers_names(name)
        for part in parts:
            for end, shape in (
                ("lora_A", (rank, linear.in_features)),
                ("lora_B", (linear.out_features // len(parts), rank)),
            ):
                matrix = torch.randn(shape, generator=generator) * _EFFECT * shape[1] ** -0.5
                tensors[f"transformer.{part}.{end}.weight"] = matrix.bfloat16()
    save_file(tensors, path)
    return path


def _overhead(stand: Stand, both: twins.Twins, *, width: int, height: int, caption: int, row: str) -> None:
    given = twins.scene(both.config, width=width, height=height, caption=caption, device=stand.device)
    file = write(stand.folder / "lora.safetensors", both.ours, RANK)
    changed = copy.deepcopy(both.ours, {id(p): p for p in both.ours.parameters()})
    LoraSet(changed).apply([file], [1.0])
    contenders: dict[str, Callable[[], Any]] = {
        "ours": twins.our_forward(both.ours, given),
        "ours with LoRA": twins.our_forward(changed, given),
    }
    if stand.wants("P1"):
        theirs = copy.deepcopy(both.theirs, {id(p): p for p in both.theirs.parameters()})
        theirs.load_lora_adapter(file)
        contenders |= {
            "P1": twins.their_forward(both.theirs, given),
            "P1 with LoRA": twins.their_forward(theirs, given),
        }
        reference = twins.their_forward(copy.deepcopy(theirs).float(), given)()
    else:
        reference = contenders["ours with LoRA"]()
    taken = stand.compare(f"rank {RANK}, {row}", contenders, reference=reference, repeats=_REPEATS)
    for who in ("ours", "P1"):
        if {who, f"{who} with LoRA"} <= taken.keys():
            added = taken[f"{who} with LoRA"] / taken[who] - 1
            stand.record(f"rank {RANK}, {row}", f"{who}: added by the LoRA", {"percent": round(100 * added, 2)})


def _swap(stand: Stand, model: Any) -> None:
    """From the order to change the file to the next forward's end, less a forward."""
    given = twins.scene(model.config, width=256, height=256, caption=20, device=stand.device)
    files = [write(stand.folder / f"demo_{i}.safetensors", model, _DEMO_RANK, seed=i) for i in (1, 2)]
    forward, loras = twins.our_forward(model, given), LoraSet(model)
    turn = 0

    def swap() -> None:
        nonlocal turn
        turn += 1
        loras.apply([files[turn % 2]], [1.0])

    def swap_and_draw() -> None:
        swap()
        forward()

    swap()
    stand.compare(
        f"the demo, another file of rank {_DEMO_RANK}",
        {"ours forward": forward, "ours swap": swap, "ours swap and forward": swap_and_draw},
    )
