"""Teach the demo a style: a LoRA on attention and feed-forward of the image's blocks, written as trainers write it.

The demo's own weights stay as they are. Flow matching goes on as in train_flow, on scenes redrawn by a style
(styles.py) with the captions they always had, so that no trigger word is needed: the file's strength decides.

    python -m training.train_lora neon          # lora_root/z_image/demo/neon.safetensors, then its table and sheet
    python -m training.train_lora neon --judge  # only the table and the sheet

An interrupted run goes on from its checkpoint in work/. The file's names are those that diffusers and ai-toolkit give
(`diffusion_model.layers.0.attention.to_q.lora_A.weight`), with an alpha for each pair and the header fields of
Stability AI's model specification and of kohya's scripts.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np
import torch
import torch._dynamo
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

from models.z_image import autoencoder, lora
from models.z_image.keys import diffusers_names
from models.z_image.text_encoder import load_tokenizer
from models.z_image.transformer import ZImageTransformer
from training.captions import Caption, write_caption
from training.checkpoints import load_checkpoint, save_checkpoint
from training.latents import LatentPool
from training.patch_code import PatchCode, load_patch_code
from training.resume import DEMO, restore_flow
from training.sampling import sample_pictures
from training.scenes import Scene, draw_scene, sample_scene
from training.styles import STYLES, Style
from training.train_flow import encode_prompt, flow_loss, write_sheet
from training.train_vae import to_pixels

FOLDER = Path("lora_root/z_image/demo")
SIZE = (256, 256)  # width and height; a style learnt on squares shows in the demo's other sizes too
# As the demo itself was trained: cells that show a shape count four times, which for a style are its glow and lines.
_SHAPE_WEIGHT = 3.0
_WARM_UP_STEPS = 20
_BRANCHES = ("noise_refiner.", "layers.")
_PARTS = {"attention.qkv": 3, "attention.out": 1, "feed_forward.w13": 2, "feed_forward.w2": 1}


class LowRank(nn.Module):
    """Trainable low-rank changes of one linear, for each of the linears that files split it into; a forward hook.

    down: (parts, rank, in). up: (parts, out / parts, rank), zero at the start.
    """

    def __init__(self, linear: nn.Linear, parts: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(parts, rank, linear.in_features) * linear.in_features**-0.5)
        self.up = nn.Parameter(torch.zeros(parts, linear.out_features // parts, rank))

    def forward(self, _linear: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """The linear's output (B, tokens, out) with the change added."""
        h_BTPR = (inputs[0] @ self.down.flatten(0, 1).T).unflatten(-1, self.down.shape[:2])
        added = [h_BTPR[..., part, :] @ up.T for part, up in enumerate(self.up)]
        return output + torch.cat(added, dim=-1)


def add_branches(transformer: ZImageTransformer, rank: int) -> nn.ModuleDict:
    """Put trainable changes beside attention and feed-forward of every block that sees the image.

    Keys are our modules' names with "/" for ".", which a ModuleDict does not allow.
    """
    branches = nn.ModuleDict()
    for name, module in transformer.named_modules():
        kind = ".".join(name.split(".")[2:])
        if name.startswith(_BRANCHES) and kind in _PARTS:
            assert isinstance(module, nn.Linear)
            branches[name.replace(".", "/")] = branch = LowRank(module, _PARTS[kind], rank)
            module.register_forward_hook(branch)
    return branches


def to_file(branches: nn.ModuleDict) -> dict[str, Tensor]:
    """The tensors of a LoRA file, bfloat16: A, B and alpha (the rank, so that nothing is scaled) of every linear."""
    tensors = {}
    for key, branch in branches.items():
        assert isinstance(branch, LowRank)
        names = diffusers_names(key.replace("/", "."))
        for name, down, up in zip(names, branch.down.detach(), branch.up.detach(), strict=True):
            tensors[f"diffusion_model.{name}.lora_A.weight"] = down.to(torch.bfloat16).contiguous()
            tensors[f"diffusion_model.{name}.lora_B.weight"] = up.to(torch.bfloat16).contiguous()
            tensors[f"diffusion_model.{name}.alpha"] = torch.tensor(float(len(down)), dtype=torch.bfloat16)
    return tensors


def describe(style: Style, rank: int, steps: int) -> dict[str, str]:
    """Header fields: modelspec 1.0.1 (Stability-AI/ModelSpec) and kohya's ss_*, which file managers read."""
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "z-image/lora",
        "modelspec.title": f"Demo: {style.title}",
        "modelspec.description": style.description,
        "modelspec.usage_hint": "For the demo's weights. Needs no trigger word; strength 1.",
        "modelspec.resolution": "256x256",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(rank),
        "ss_base_model_version": "z_image_demo",
        "ss_steps": str(steps),
        "ss_tag_frequency": json.dumps({}),
    }


def draw_pool(style: Style, code: PatchCode, size: tuple[int, int], count: int, rng: np.random.Generator) -> LatentPool:
    """Random training scenes in the style, as latents; every third shows two shapes."""
    scenes = [sample_scene(rng, held_out=False, num_shapes=1 + (i % 3 == 1)) for i in range(count)]
    latents = [code.encode(to_pixels([style.draw(scene, *size)])) for scene in scenes]
    return LatentPool(scenes, torch.cat(latents).numpy().astype(np.float16))


def train(arguments: argparse.Namespace) -> None:
    """Train from the checkpoint, or from the start, and write the file."""
    torch.manual_seed(arguments.seed)
    style, code = STYLES[arguments.style], load_patch_code()
    model = restore_flow(arguments.demo).requires_grad_(False)
    tokenizer = load_tokenizer(arguments.demo / "text_encoder")
    branches = add_branches(model.transformer, arguments.rank)
    parameters = list(branches.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=arguments.rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    checkpoint = arguments.work / f"lora_{arguments.style}.pt"
    first_step = 0
    if arguments.start_from is not None:
        branches.load_state_dict(load_checkpoint(arguments.start_from)["branches"])
    if checkpoint.exists():
        saved = load_checkpoint(checkpoint)
        branches.load_state_dict(saved["branches"])
        optimizer.load_state_dict(saved["optimizer"])
        first_step = saved["step"]

    pool = draw_pool(style, code, SIZE, arguments.pictures, np.random.default_rng((arguments.seed, 1)))
    if arguments.compile:
        compile_blocks([*model.transformer.noise_refiner, *model.transformer.layers])
    running, began = None, time.monotonic()
    for step in range(first_step, arguments.steps):
        rng = np.random.default_rng((arguments.seed, 2, step))
        generator = torch.Generator().manual_seed(arguments.seed * 1_000_003 + step)
        for group in optimizer.param_groups:
            group["lr"] = arguments.rate * share_of_rate(step, arguments.steps)
        error, loss = flow_loss(
            model, pool, tokenizer, arguments.batch, False, rng, generator, shape_weight=_SHAPE_WEIGHT
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        running = float(error) if running is None else 0.97 * running + 0.03 * float(error)
        if (step + 1) % 25 == 0:
            seconds = (time.monotonic() - began) / (step + 1 - first_step)
            print(f"step {step + 1} loss {running:.4f} {seconds:.3f} s/step", flush=True)
        if (step + 1) % arguments.save_every == 0 or step + 1 == arguments.steps:
            state = {"branches": branches.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            save_checkpoint(checkpoint, state)
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / f"{arguments.style}.safetensors"
    save_file(to_file(branches), path, metadata=describe(style, arguments.rank, arguments.steps))
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB", flush=True)


def share_of_rate(step: int, steps: int) -> float:
    """Of the peak: a short warm-up, then all of it, falling to zero over the second half of the run."""
    return min(1.0, (step + 1) / _WARM_UP_STEPS, 2 * (steps - step) / steps)


def compile_blocks(blocks: Iterable[nn.Module]) -> None:
    """Compile each block's forward, hooks on its linears included."""
    torch._dynamo.config.recompile_limit = 64  # blocks share their code, and each is a case of its own
    for block in blocks:
        block.forward = torch.compile(block.forward, dynamic=False)


def nearest(pictures: list[NDArray[np.uint8]], drawings: list[NDArray[np.uint8]]) -> NDArray[np.float64]:
    """Mean absolute difference in steps of 255 of every picture (rows) from every drawing (columns)."""
    flat = np.stack([drawing.reshape(-1).astype(np.int16) for drawing in drawings])
    return np.stack([np.abs(flat - picture.reshape(-1)).mean(1) for picture in pictures])


@torch.no_grad()
def judge(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Held-out captions with the file at strengths 1 and 0, through the program's own LoRA code and the demo's VAE.

    own style: share of pictures that are nearer to their scene in the style than to their scene as it is. own scene:
    share that are nearer to their own styled (at 0: plain) scene than to any other caption's. difference: median of
    the mean absolute difference from it, of 255. Writes a sheet: a row plain, a row in the style, and so on.
    """
    model = restore_flow(arguments.demo).requires_grad_(False)
    tokenizer = load_tokenizer(arguments.demo / "text_encoder")
    vae = autoencoder.load_vae(arguments.demo / "vae" / "diffusion_pytorch_model.safetensors", torch.float32)
    scenes, captions = held_out(arguments.count)
    width, height = map(int, arguments.size.split("x"))
    styled = [STYLES[arguments.style].draw(scene, width, height) for scene in scenes]
    plain = [draw_scene(scene, width, height) for scene in scenes]
    file = lora.read(arguments.output / f"{arguments.style}.safetensors")
    report, drawn = {}, {}
    for strength in (1.0, 0.0):
        (match,) = lora.apply(model.transformer, [file], [strength])
        assert match.matched == match.total, match.unmatched
        pictures: list[NDArray[np.uint8]] = []
        for start in range(0, len(captions), 8):
            pictures += sample_pictures(
                model.transformer,
                lambda prompts: model.encode_text([encode_prompt(p, tokenizer) for p in prompts]),
                lambda latents: autoencoder.decode(vae, latents),
                [c.text for c in captions[start : start + 8]],
                width=width,
                height=height,
                first_seed=start,
            )
        to_style, to_plain = nearest(pictures, styled), nearest(pictures, plain)
        to_truth = to_style if strength else to_plain
        report[f"strength {strength:g}"] = {
            "own style": float((to_style.diagonal() < to_plain.diagonal()).mean()),
            "own scene": float((to_truth.argmin(1) == np.arange(len(scenes))).mean()),
            "difference": float(np.median(to_truth.diagonal())),
        }
        drawn[strength] = pictures
    for name, row in report.items():
        words = ", ".join(f"{key} {value:.2f}" for key, value in row.items())
        print(f"{arguments.style}, {name}, {len(captions)} held-out captions: {words}", flush=True)
    rows = [i for start in range(0, min(len(captions), 16), 8) for i in (start, start)]
    pairs = [drawn[float(odd % 2)][i : i + 8] for odd, i in enumerate(rows)]
    sheet = arguments.work / f"lora_{arguments.style}.png"
    write_sheet(sheet, [p for pair in pairs for p in pair], [c for i in rows for c in captions[i : i + 8]])
    return report


def held_out(count: int) -> tuple[list[Scene], list[Caption]]:
    """Scenes and wordings that training never saw; one in four shows two shapes. Everything is mentioned."""
    rng = np.random.default_rng(777)
    scenes = [sample_scene(rng, held_out=True, num_shapes=1 if i % 4 else 2) for i in range(count)]
    return scenes, [write_caption(scene, rng, held_out=True, complete=True) for scene in scenes]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("style", choices=list(STYLES))
    parser.add_argument("--judge", action="store_true", help="judge the file that is there, train nothing")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rate", type=float, default=2e-3, help="AdamW's")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--pictures", type=int, default=800, help="size of the pool of drawings")
    parser.add_argument("--count", type=int, default=48, help="held-out captions to judge with")
    parser.add_argument("--size", default="256x256", help="WxH to judge at")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--start-from", type=Path, help="checkpoint of another run of this script to begin with")
    parser.add_argument("--demo", type=Path, default=DEMO)
    parser.add_argument("--work", type=Path, default=Path("work"), help="folder of checkpoints and sheets")
    parser.add_argument("--output", type=Path, default=FOLDER)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    cv2.setNumThreads(arguments.threads)
    if not arguments.judge:
        train(arguments)
    judge(arguments)


if __name__ == "__main__":
    main()
