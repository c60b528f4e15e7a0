"""Train a control branch for the demo: it follows edges, and knows what stands around a hole.

The branch has the layout of Fun ControlNet Union 2.1 (models/z_image/control.py) with one refiner block and one layer,
which begin as copies of the demo's own. The demo stays as it is. A control context holds what a user's would: the
canny edges of a drawing in any colours, through the demo's autoencoder; a mask of what is to be kept; the picture
without the rest. Edges, hole, or both are shown in turn.

Captions must not give away what the edges are to say. Half the pictures show outlines without a name, at any place
and turned (outlines.py), and their captions speak of colours only; so do those of half the nameable scenes.

    python -m training.train_control            # models/z_image/demo_control/control.safetensors, then judge_control

An interrupted run goes on from its checkpoint in work/. Encoded drawings are kept in work/control_pools.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from models.z_image import autoencoder
from models.z_image.config import SEQUENCE_MULTIPLE
from models.z_image.control import ControlBlock, ControlBranch, ControlSignal
from models.z_image.control_config import ControlConfig
from models.z_image.editing import ControlPicture
from models.z_image.loader import to_diffusers
from models.z_image.text_encoder import load_tokenizer
from models.z_image.transformer import ZImageTransformer
from shared.preprocess import process
from training.captions import COLOUR_WORDS, write_caption
from training.checkpoints import load_checkpoint, save_checkpoint
from training.outlines import Drawing, drawing_of, paint, sample_drawing
from training.patch_code import PatchCode, load_patch_code
from training.resume import DEMO, restore_flow
from training.scenes import COLOURS, Scene, Shape, sample_scene
from training.train_flow import TextToLatents, draw_sigmas, encode_prompt
from training.train_lora import compile_blocks, share_of_rate
from training.train_vae import to_pixels

CONTROL_FILE = Path("models/z_image/demo_control/control.safetensors")
CONFIG = ControlConfig(places=(0,), in_channels=33, refiner="own", refiner_places=(0,))
SIZE = (256, 256)  # width and height; edges are a matter of neighbours, and other sizes have the same

EDGES, HOLE = slice(0, 16), slice(16, 33)  # channels of a context
_P_EDGES_ALONE, _P_HOLE_ALONE = 0.55, 0.25  # the rest shows both
_P_NAMELESS = 0.5
_P_COLOURS_ONLY = 0.5  # of a nameable shape's captions
_P_EMPTY_CAPTION = 0.05
_HOLE_SIDES = (0.3, 0.8)  # of the picture's
# As in the demo's own training: cells of the shape, by their difference from the ground's latents, count four times.
_SHAPE_CELL, _SHAPE_WEIGHT = 0.35, 3.0
_MUON_NAMES = {"attention", "feed_forward"}
_TRIES = 12

_COLOUR_FRAMES = (
    "{a} shape on {g_a} background",
    "{A} shape, {g} background",
    "{g_a} background with {a} shape",
    "there is {a} shape on {g_a} background",
    "{A} on {g}",
    "a picture of {a} shape on {g_a} ground",
)
COLOUR_FRAME_HELD_OUT = "{a} shape in front of {g_a} background"


@dataclass(frozen=True)
class Example:
    """A drawing, and the scene that captions can describe it as; None: its outline has no name."""

    drawing: Drawing
    scene: Scene | None


@dataclass(frozen=True)
class ControlPool:
    """Examples of one picture size. clean (n, 16, h, w), context (n, 33, h, w) with edges and hole: float16.

    scenes: None where only the colours can be said, which are (ground, shape).
    """

    scenes: list[Scene | None]
    colours: list[tuple[str, str]]
    clean: NDArray[np.float16]
    context: NDArray[np.float16]


def sample_example(rng: np.random.Generator, width: int, height: int) -> Example:
    """An outline without a name, or a scene of the captions' world from the training side of the split."""
    if rng.random() < _P_NAMELESS:
        return Example(sample_drawing(rng, width, height, held_out=False), None)
    scene = sample_scene(rng, held_out=False)
    return Example(drawing_of(scene, width, height), scene)


def edges_of(drawing: Drawing, width: int, height: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Canny edges (height, width, 3) of the drawing in random colours: they say where, never in which colour."""
    ground, *colours = (str(c) for c in rng.choice(list(COLOURS), size=1 + len(drawing.shapes), replace=False))
    shapes = tuple(replace(shape, colour=c) for shape, c in zip(drawing.shapes, colours, strict=True))
    return process("canny", paint(Drawing(ground, shapes), width, height))


def sample_hole(rng: np.random.Generator, width: int, height: int) -> Tensor:
    """(1, height, width) float32: 1 is repainted, a rectangle or an ellipse."""
    w, h = (int(rng.uniform(*_HOLE_SIDES) * side) for side in (width, height))
    x, y = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
    hole = np.zeros((height, width), np.uint8)
    if rng.random() < 0.5:
        hole[y : y + h, x : x + w] = 1
    else:
        cv2.ellipse(hole, (x + w // 2, y + h // 2), (w // 2, h // 2), 0, 0, 360, 1, cv2.FILLED)
    return torch.from_numpy(hole)[None].float()


def make_pool(
    code: PatchCode, encode: Callable[[Tensor], Tensor], size: tuple[int, int], count: int, rng: np.random.Generator
) -> ControlPool:
    """Draw and encode examples. encode: the autoencoder's, for what a user's control picture goes through."""
    examples = [sample_example(rng, *size) for _ in range(count)]
    clean, context = [], []
    for example in examples:
        picture = to_pixels([paint(example.drawing, *size)])
        shown = ControlPicture(
            channels=CONFIG.in_channels,
            picture=to_pixels([edges_of(example.drawing, *size, rng)])[0],
            repaint=picture[0],
            mask=sample_hole(rng, *size),
        )
        clean.append(code.encode(picture).half())
        context.append(shown.context(encode).half())
    colours = [(e.drawing.ground, e.drawing.shapes[0].colour) for e in examples]
    return ControlPool([e.scene for e in examples], colours, torch.cat(clean).numpy(), torch.cat(context).numpy())


def load_or_make_pool(folder: Path, vae_file: Path, size: tuple[int, int], count: int, seed: int) -> ControlPool:
    """make_pool, kept in a file whose name says what it was made of: the autoencoder above all."""
    digest = hashlib.sha256(vae_file.read_bytes()).hexdigest()[:12]
    path = folder / f"{size[0]}x{size[1]}_{count}_{seed}_{digest}.npz"
    if not path.exists():
        vae = autoencoder.load_vae(vae_file, torch.float32)
        rng = np.random.default_rng((seed, *size))
        with torch.no_grad():
            pool = make_pool(load_patch_code(), lambda p: autoencoder.encode(vae, p), size, count, rng)
        listed = json.dumps([None if s is None else asdict(s) for s in pool.scenes])
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".part.npz")
        np.savez(partial, clean=pool.clean, context=pool.context, colours=np.array(pool.colours), scenes=listed)
        partial.replace(path)
        return pool
    with np.load(path) as saved:
        scenes = [
            None if s is None else Scene(s["ground"], tuple(Shape(**shape) for shape in s["shapes"]))
            for s in json.loads(str(saved["scenes"]))
        ]
        colours = [(str(ground), str(colour)) for ground, colour in saved["colours"]]
        return ControlPool(scenes, colours, saved["clean"], saved["context"])


def word_colours(ground: str, colour: str, rng: np.random.Generator, *, held_out: bool = False) -> str:
    """A caption that says the two colours and nothing of what is drawn where."""
    g, a = (str(rng.choice(COLOUR_WORDS.get(c, (c,)))) for c in (ground, colour))
    articles = {name: ("an " if word[0] in "aeiou" else "a ") + word for name, word in (("g_a", g), ("a", a))}
    frame = COLOUR_FRAME_HELD_OUT if held_out else str(rng.choice(_COLOUR_FRAMES))
    return frame.format(g=g, A=a, **articles)


def word_example(
    scene: Scene | None, colours: tuple[str, str], tokenizer: PreTrainedTokenizerBase, rng: np.random.Generator
) -> list[int]:
    """Token ids of a caption that fills at most one padded sequence: the scene's, or of the colours alone."""
    if rng.random() < _P_EMPTY_CAPTION:
        return encode_prompt("", tokenizer)
    tell_all = scene is not None and (len(scene.shapes) > 1 or rng.random() > _P_COLOURS_ONLY)
    if scene is not None and tell_all:
        for _ in range(_TRIES):
            ids = encode_prompt(write_caption(scene, rng).text, tokenizer)
            if len(ids) <= SEQUENCE_MULTIPLE:
                return ids
    return encode_prompt(word_colours(*colours, rng), tokenizer)


def hide(context: Tensor, rng: np.random.Generator) -> Tensor:
    """Of each context (B, 33, h, w) keep the edges alone, the hole alone, or both; what is hidden is 0, as in use."""
    context = context.clone()
    for row, chance in enumerate(rng.random(len(context))):
        if chance < _P_EDGES_ALONE:
            context[row, HOLE] = 0
        elif chance < _P_EDGES_ALONE + _P_HOLE_ALONE:
            context[row, EDGES] = 0
    return context


def grow_branch(trunk: ZImageTransformer) -> ControlBranch:
    """A branch that begins as copies of the trunk's blocks and says nothing yet: after_proj is 0."""
    branch = ControlBranch(trunk.config, CONFIG)
    nn.init.trunc_normal_(branch.x_embedder.weight, std=branch.x_embedder.in_features**-0.5)
    nn.init.zeros_(branch.x_embedder.bias)
    pairs = [(branch.noise_refiner[i], trunk.noise_refiner[place]) for i, place in enumerate(CONFIG.refiner_places)]
    pairs += [(branch.layers[i], trunk.layers[place]) for i, place in enumerate(CONFIG.places)]
    for mine, theirs in pairs:
        assert isinstance(mine, ControlBlock)
        mine.load_state_dict(theirs.state_dict(), strict=False)
        nn.init.zeros_(mine.after_proj.weight)
        nn.init.zeros_(mine.after_proj.bias)
        if hasattr(mine, "before_proj"):
            nn.init.eye_(mine.before_proj.weight)
            nn.init.zeros_(mine.before_proj.bias)
    return branch


def to_file(branch: ControlBranch) -> dict[str, Tensor]:
    """The branch in bfloat16 under the names of VideoX-Fun's files."""
    theirs = to_diffusers(branch.state_dict())
    return {f"control_{name}": tensor.to(torch.bfloat16) for name, tensor in theirs.items()}


def control_loss(
    model: TextToLatents,
    pool: ControlPool,
    tokenizer: PreTrainedTokenizerBase,
    batch: int,
    rng: np.random.Generator,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Mean squared error of the predicted x0 - noise on a random batch, and the same with more weight on shapes."""
    chosen = rng.integers(len(pool.scenes), size=batch)
    clean = torch.from_numpy(pool.clean[chosen]).float()
    context = hide(torch.from_numpy(pool.context[chosen]).float(), rng)
    ids = [word_example(pool.scenes[i], pool.colours[i], tokenizer, rng) for i in chosen]
    noise = torch.randn(clean.shape, generator=generator)
    sigmas = draw_sigmas(batch, generator)
    level = sigmas[:, None, None, None]
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            captions = model.transformer.encode_captions(model.encode_text(ids))
        model.features.clear()
        mixed = (1 - level) * clean + level * noise
        predicted = model.transformer(mixed, 1 - sigmas, captions, ControlSignal(context, 1.0))
    error = (predicted.float() - (clean - noise)).square()
    ground = clean.flatten(2).median(-1).values[..., None, None]
    weight = 1 + _SHAPE_WEIGHT * ((clean - ground).abs().mean(1, keepdim=True) > _SHAPE_CELL).float()
    return error.mean().detach(), (error * weight).mean() / weight.mean()


def train(arguments: argparse.Namespace) -> None:
    """Train from the checkpoint, or from the start, and write the file."""
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.threads)
    tokenizer = load_tokenizer(arguments.demo / "text_encoder")
    model = restore_flow(arguments.demo).requires_grad_(False)
    model.transformer.control = branch = grow_branch(model.transformer)
    named = list(branch.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and _MUON_NAMES & set(name.split("."))]
    rest = [p for _, p in named if not any(p is m for m in matrices)]
    adamw = torch.optim.AdamW(rest, lr=arguments.rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    muon = torch.optim.Muon(matrices, lr=arguments.muon_rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    peaks = {adamw: arguments.rate, muon: arguments.muon_rate}
    first_step = 0
    if arguments.start_from is not None:
        branch.load_state_dict(load_checkpoint(arguments.start_from)["branch"])
    if arguments.checkpoint.exists():
        saved = load_checkpoint(arguments.checkpoint)
        branch.load_state_dict(saved["branch"])
        adamw.load_state_dict(saved["adamw"])
        muon.load_state_dict(saved["muon"])
        first_step = saved["step"]

    vae_file = arguments.demo / "vae" / "diffusion_pytorch_model.safetensors"
    pool = load_or_make_pool(arguments.pools, vae_file, SIZE, arguments.pictures, arguments.seed)
    if arguments.compile:
        trunk = model.transformer
        compile_blocks([*trunk.noise_refiner, *trunk.layers, *branch.noise_refiner, *branch.layers])
    parameters = list(branch.parameters())
    running, began = None, time.monotonic()
    for step in range(first_step, arguments.steps):
        rng = np.random.default_rng((arguments.seed, 3, step))
        generator = torch.Generator().manual_seed(arguments.seed * 1_000_003 + step)
        for optimizer, peak in peaks.items():
            rate = peak * share_of_rate(step, arguments.steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
        error, loss = control_loss(model, pool, tokenizer, arguments.batch, rng, generator)
        for optimizer in peaks:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in peaks:
            optimizer.step()
        running = float(error) if running is None else 0.97 * running + 0.03 * float(error)
        if (step + 1) % 25 == 0:
            seconds = (time.monotonic() - began) / (step + 1 - first_step)
            print(f"step {step + 1} loss {running:.4f} {seconds:.3f} s/step", flush=True)
        if (step + 1) % arguments.save_every == 0 or step + 1 == arguments.steps:
            states = {"branch": branch.state_dict(), "adamw": adamw.state_dict(), "muon": muon.state_dict()}
            save_checkpoint(arguments.checkpoint, {**states, "step": step + 1})
    write_file(branch, arguments.output)


def write_file(branch: ControlBranch, path: Path) -> None:
    """The file that users load; its header says which layers the hints belong to, as diffusers and VideoX-Fun do."""
    path.parent.mkdir(parents=True, exist_ok=True)
    config = {"control_layers_places": list(CONFIG.places), "control_in_dim": CONFIG.in_channels}
    save_file(to_file(branch), path, metadata={"format": "pt", "config": json.dumps(config)})
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB", flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--rate", type=float, default=1e-3, help="AdamW's")
    parser.add_argument("--muon-rate", type=float, default=3e-3, help="Muon's, on AdamW's scale")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--pictures", type=int, default=1000, help="size of the pool of drawings")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--start-from", type=Path, help="checkpoint of another run of this script to begin with")
    parser.add_argument("--demo", type=Path, default=DEMO)
    parser.add_argument("--pools", type=Path, default=Path("work/control_pools"))
    parser.add_argument("--checkpoint", type=Path, default=Path("work/control.pt"))
    parser.add_argument("--output", type=Path, default=CONTROL_FILE)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
