"""Teach the text encoder to read, before it meets the transformer: captions in, attributes out.

Learning to read from a diffusion loss alone is slow: the gradient that says "this word is a colour" is
buried in noise. Here the encoder first learns, in minutes, to gather what a caption promises on the tokens
that close the prompt template, where linear heads read it: one token holds the ground's colour, two more hold
kind, colour, size and place of a shape each. The heads are then thrown away; `train_flow --text-encoder` starts
from the encoder and goes on training it with the transformer.

    python -m training.train_text --steps 900
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from training.captions import Caption, write_caption
from training.checkpoints import load_checkpoint, save_checkpoint
from training.scenes import COLOURS, KINDS, PLACES, SIZES, sample_scene
from training.train_flow import TEXT_ENCODER_LAYERS, TEXT_ENCODER_SIZES, build_text_encoder, encode_prompt

_IGNORED = -100  # cross entropy skips these: the caption does not say
_ABSENT = 0  # class of a second shape that is not there; values follow from 1
_VALUES: dict[str, list[str]] = {
    "kind": list(KINDS),
    "colour": list(COLOURS),
    "size": list(SIZES),
    "place": list(PLACES),
}
# which token, counted from the end of the template "<|im_end|>\n<|im_start|>assistant\n", holds what
_GROUND_TOKEN = -1
_SHAPE_TOKENS = (-2, -3)
_KEEP_WEIGHT = 2.0


class Reader(nn.Module):
    """Text encoder with the heads that read it."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        width = TEXT_ENCODER_SIZES["hidden_size"]
        self.encoder = build_text_encoder(vocabulary, layers=TEXT_ENCODER_LAYERS - 1)
        self.norm = nn.RMSNorm(width, elementwise_affine=False)
        self.ground = nn.Linear(width, len(COLOURS))
        self.shapes = nn.ModuleDict({name: nn.Linear(width, len(values) + 1) for name, values in _VALUES.items()})

    def features(self, ids: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Normalised features (B, longest, width) and, for each row, how many of them are real."""
        longest = max(map(len, ids))
        padded = torch.tensor([row + [0] * (longest - len(row)) for row in ids])
        hidden = self.encoder(input_ids=padded, use_cache=False).last_hidden_state
        return self.norm(hidden), torch.tensor([len(row) for row in ids])

    def read(self, features: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        """Logits: "ground" (B, colours); "kind", "colour", "size", "place" (B, 2 shapes, values + 1)."""
        rows = torch.arange(len(lengths))
        shapes = torch.stack([features[rows, lengths + offset] for offset in _SHAPE_TOKENS], 1)
        logits = {name: head(shapes) for name, head in self.shapes.items()}
        return {"ground": self.ground(features[rows, lengths + _GROUND_TOKEN]), **logits}


def make_targets(captions: list[Caption]) -> dict[str, Tensor]:
    """Class indices in the layout of Reader's logits; `_IGNORED` where a caption leaves something open."""
    grounds = [list(COLOURS).index(c.ground) if c.ground else _IGNORED for c in captions]
    targets = {"ground": torch.tensor(grounds)}
    for name, values in _VALUES.items():
        grid = torch.full((len(captions), len(_SHAPE_TOKENS)), _ABSENT)
        for row, caption in enumerate(captions):
            for slot, promise in enumerate(caption.shapes):
                promised = getattr(promise, name)
                grid[row, slot] = 1 + values.index(promised) if promised else _IGNORED
        targets[name] = grid
    return targets


def random_captions(
    count: int, tokenizer: PreTrainedTokenizerBase, rng: np.random.Generator, *, held_out: bool
) -> tuple[list[list[int]], dict[str, Tensor]]:
    """Token ids and targets of `count` fresh captions."""
    scenes = [sample_scene(rng, held_out=held_out) for _ in range(count)]
    captions = [write_caption(s, rng, held_out=held_out, wordy=bool(rng.random() < 0.1)) for s in scenes]
    return [encode_prompt(c.text, tokenizer) for c in captions], make_targets(captions)


def reading_loss(logits: dict[str, Tensor], targets: dict[str, Tensor]) -> Tensor:
    """Sum of the cross entropies. Which of two shapes goes to which token is free: the better way counts."""
    ground = F.cross_entropy(logits["ground"], targets["ground"], ignore_index=_IGNORED)
    straight, crossed = _both_ways(logits, targets)
    return ground + torch.minimum(straight, crossed).mean()


def _both_ways(logits: dict[str, Tensor], targets: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Loss (B,) of the shapes as they are listed, and with the two exchanged (never when there is only one)."""

    def loss(flip: bool) -> Tensor:
        total = torch.zeros(len(targets["ground"]))
        for name in _VALUES:
            wanted = targets[name].flip(1) if flip else targets[name]
            total = total + F.cross_entropy(
                logits[name].transpose(1, 2), wanted, ignore_index=_IGNORED, reduction="none"
            ).sum(1)
        return total

    single = targets["kind"][:, 1] == _ABSENT
    straight = loss(flip=False)
    return straight, torch.where(single, straight, loss(flip=True))


@torch.no_grad()
def accuracy(model: Reader, ids: list[list[int]], targets: dict[str, Tensor]) -> dict[str, float]:
    """Share of captions read right in everything that they say, by attribute."""
    logits = model.read(*model.features(ids))
    straight, crossed = _both_ways(logits, targets)
    flip = (crossed < straight)[:, None]
    shares = {}
    for name, target in targets.items():
        wanted = target if name == "ground" else torch.where(flip, target.flip(1), target)
        right = (logits[name].argmax(-1) == wanted) | (wanted == _IGNORED)
        shares[name] = float(right.reshape(len(ids), -1).all(1).float().mean())
    return shares


def kept_loss(features: Tensor, lengths: Tensor, earlier: Reader, ids: list[list[int]]) -> Tensor:
    """How far the features have moved from an earlier encoder's, on every real token but those that hold the shapes."""
    with torch.no_grad():
        before, _ = earlier.features(ids)
    from_end = torch.arange(features.shape[1]) - lengths[:, None]
    kept = (from_end < 0) & ~torch.isin(from_end, torch.tensor(_SHAPE_TOKENS))
    return (features - before)[kept].square().mean()


def train(arguments: argparse.Namespace) -> None:
    """Train from the start; it takes minutes."""
    torch.manual_seed(arguments.seed)
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer, local_files_only=True)
    model = Reader(len(tokenizer))
    earlier: Reader | None = None
    if arguments.keep is not None:
        earlier = Reader(len(tokenizer)).requires_grad_(False)
        flow = load_checkpoint(arguments.keep)["model"]
        encoder = {n.removeprefix("text_encoder."): t for n, t in flow.items() if n.startswith("text_encoder.")}
        earlier.encoder.load_state_dict(encoder)
        model.encoder.load_state_dict(encoder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.5e-3, betas=(0.9, 0.98), weight_decay=0.02, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-3, total_steps=arguments.steps, pct_start=0.1)
    started = time.monotonic()
    for step in range(arguments.steps):
        rng = np.random.default_rng((arguments.seed, 7, step))
        ids, targets = random_captions(64, tokenizer, rng, held_out=False)
        with torch.autocast("cpu", torch.bfloat16):
            features, lengths = model.features(ids)
            logits = model.read(features, lengths)
        loss = reading_loss({name: value.float() for name, value in logits.items()}, targets)
        if earlier is not None:
            loss = loss + _KEEP_WEIGHT * kept_loss(features.float(), lengths, earlier, ids)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0 or step + 1 == arguments.steps:
            held_out = random_captions(128, tokenizer, np.random.default_rng(arguments.seed), held_out=True)
            words = " ".join(f"{name} {share:.2f}" for name, share in accuracy(model, *held_out).items())
            seconds = (time.monotonic() - started) / (step + 1)
            print(f"step {step + 1} loss {float(loss):.3f} {seconds:.2f} s/step held-out: {words}", flush=True)
            save_checkpoint(arguments.checkpoint, {"encoder": model.encoder.state_dict(), "step": step + 1})


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", type=Path, default=Path("work/text_encoder"))
    parser.add_argument("--keep", type=Path, help="go on from the encoder of this flow run, keeping its other features")
    parser.add_argument("--checkpoint", type=Path, default=Path("work/text.pt"))
    train(parser.parse_args())


if __name__ == "__main__":
    main()
