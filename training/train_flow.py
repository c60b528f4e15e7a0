"""Train the demo's text encoder and transformer together, end to end, with flow matching on cached latents.

The network sees x = (1 - sigma) * x0 + sigma * noise at model time 1 - sigma and learns x0 - noise. Sigma
is drawn from a logistic-normal moved towards noise by the sampler's shift of 3, with extra weight near 1,
where 8-step sampling decides what goes where. One caption in ten is empty, so that guidance works. An
exponential average of the weights is what gets exported. The matrices of attention and feed-forward are trained by
Muon (Jordan et al. 2024, as torch.optim.Muon), which here needs two thirds of AdamW's steps; AdamW trains the rest.
Workers share Muon's work: each owns some matrices, steps those, and sends them to the others.

Stages (see STAGES): small pictures first, then the final sizes. The rate rises over the first 100 steps,
stays, and falls to zero over the last `--decay` steps; a run can so be stopped and lengthened until the
decay has begun. Everything random is a function of seed and step, and checkpoints hold the rest: an
interrupted run goes on as if nothing had happened.

    python -m training.train_flow --steps 9000
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
import torch._dynamo
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen3Config, Qwen3Model

from models.z_image.config import SEQUENCE_MULTIPLE, TransformerConfig
from models.z_image.transformer import ZImageTransformer
from training.captions import Caption, write_caption
from training.checker import judge_picture
from training.checkpoints import load_checkpoint, save_checkpoint
from training.latents import LatentPool, load_pool
from training.layout import DeepLayoutHeads
from training.patch_code import load_patch_code
from training.sampling import sample_pictures
from training.scenes import Scene, sample_scene
from training.tokenizer import TEMPLATE

TRANSFORMER_CONFIG = TransformerConfig(
    dim=384, n_heads=3, n_layers=3, n_refiner_layers=1, cap_feat_dim=256, ffn_dim=1024, in_channels=16
)
TEXT_ENCODER_SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
TEXT_ENCODER_LAYERS = 3  # on disk; as in the big model the features come before the last, which is never run

_P_EMPTY_CAPTION = 0.1
_P_LONG_CAPTIONS = 0.15  # batches whose captions fill 33 to 64 tokens
_P_NEAR_NOISE = 0.2  # only there does the caption decide what goes where
_NEAR_NOISE = 0.12
_P_ONE_SHAPE = 0.75
_SHAPE_CELL = 0.35  # mean difference from the ground's latents beyond which a cell belongs to a shape or its shadow
_SHIFT = 3.0
_WARM_UP_STEPS = 100
_MUON_NAMES = {"attention", "feed_forward"}
_EMA_DECAY = 0.999
_TRIES = 12


@dataclass(frozen=True)
class Stage:
    """From which step on, which picture sizes (width, height) are mixed in which proportion, and the batch of each."""

    first_step: int
    sizes: tuple[tuple[int, int], ...]
    weights: tuple[float, ...]
    batches: tuple[int, ...]


class TextToLatents(nn.Module):
    """Text encoder and transformer as one module to optimise, average and save."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.text_encoder = build_text_encoder(vocabulary, layers=TEXT_ENCODER_LAYERS - 1)
        self.transformer = ZImageTransformer(TRANSFORMER_CONFIG)
        initialise(self.transformer)
        self.features: list[Tensor] = []  # what went into the layers after the first, and into the final one
        for layer in [*self.transformer.layers[1:], self.transformer.final_layer]:
            layer.register_forward_pre_hook(self._keep_features)

    def _keep_features(self, _layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if torch.is_grad_enabled():
            self.features.append(inputs[0])

    def encode_text(self, ids: list[list[int]]) -> list[Tensor]:
        """Features (tokens, 256) of each prompt. Padding stands on the right, where causal attention never looks."""
        longest = max(map(len, ids))
        padded = torch.tensor([row + [0] * (longest - len(row)) for row in ids])
        hidden = self.text_encoder(input_ids=padded, use_cache=False).last_hidden_state
        return [hidden[i, : len(row)] for i, row in enumerate(ids)]

    def forward(self, latents: Tensor, t: Tensor, ids: list[list[int]]) -> Tensor:
        """latents (B, 16, h, w), t (B,) -> prediction of x0 - noise (B, 16, h, w)."""
        self.features.clear()
        return self.transformer(latents, t, self.encode_text(ids))


def build_text_encoder(vocabulary: int, *, layers: int) -> Qwen3Model:
    """A small Qwen3 without final norm, whose last hidden state is the feature the transformer reads."""
    config = Qwen3Config(
        vocab_size=vocabulary,
        num_hidden_layers=layers,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        max_position_embeddings=4096,
        use_cache=False,
        attn_implementation="sdpa",
        **TEXT_ENCODER_SIZES,
    )
    encoder = Qwen3Model(config)
    encoder.norm = nn.Identity()
    return encoder


def initialise(transformer: ZImageTransformer) -> None:
    """Small random linears; modulation starts at scale 0 and gates half open; the output starts at zero."""
    for module in transformer.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=module.in_features**-0.5 * 0.8)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.normal_(transformer.x_pad_token, std=0.02)
    nn.init.normal_(transformer.cap_pad_token, std=0.02)
    dim = transformer.config.dim
    for block in [*transformer.noise_refiner, *transformer.layers]:
        modulation = block.adaLN_modulation[0]
        nn.init.zeros_(modulation.weight)
        with torch.no_grad():
            modulation.bias.view(4, dim)[1::2] = 0.3
    nn.init.zeros_(transformer.final_layer.adaLN_modulation[1].weight)
    nn.init.zeros_(transformer.final_layer.linear.weight)


def draw_sigmas(count: int, generator: torch.Generator) -> Tensor:
    """(count,) noise levels in (0, 1)."""
    sigmas = torch.sigmoid(torch.randn(count, generator=generator))
    sigmas = _SHIFT * sigmas / (1 + (_SHIFT - 1) * sigmas)
    near_noise = torch.rand(count, generator=generator) < _P_NEAR_NOISE
    return torch.where(near_noise, 1 - _NEAR_NOISE * torch.rand(count, generator=generator), sigmas)


def word_scenes(
    scenes: list[Scene], tokenizer: PreTrainedTokenizerBase, rng: np.random.Generator, long: bool
) -> tuple[list[int], list[list[int]]]:
    """Token ids for a batch, all padded to the same multiple of 32 by the network, so that nothing needs a mask.

    long: wordy captions of 33 to 64 tokens, instead of captions of at most 32.
    Returns (indices of the scenes used, ids): a scene whose caption never fits is replaced by another of the batch.
    """
    low, high = (SEQUENCE_MULTIPLE + 1, 2 * SEQUENCE_MULTIPLE) if long else (1, SEQUENCE_MULTIPLE)
    used: list[int] = []
    rows: list[list[int]] = []
    for index, scene in enumerate(scenes):
        for _ in range(_TRIES):
            text = write_caption(scene, rng, wordy=long).text
            if not long and rng.random() < _P_EMPTY_CAPTION:
                text = ""
            ids = encode_prompt(text, tokenizer)
            if low <= len(ids) <= high:
                used.append(index)
                rows.append(ids)
                break
    while len(rows) < len(scenes):
        twin = int(rng.integers(len(rows)))
        used.append(used[twin])
        rows.append(rows[twin])
    return used, rows


def encode_prompt(prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a prompt inside the template."""
    ids: list[int] = tokenizer(TEMPLATE.format(prompt=prompt), add_special_tokens=False)["input_ids"]
    return ids


def flow_loss(
    model: TextToLatents,
    pool: LatentPool,
    tokenizer: PreTrainedTokenizerBase,
    batch: int,
    long: bool,
    rng: np.random.Generator,
    generator: torch.Generator,
    heads: DeepLayoutHeads | None = None,
    layout_weight: float = 0.0,
    shape_weight: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Mean squared error of the predicted x0 - noise on one random batch, and the whole loss with its helpers.

    shape_weight: how much more a latent cell counts that differs from the ground. layout_weight: of `heads`' loss.
    """
    by_count = [np.array([i for i, s in enumerate(pool.scenes) if len(s.shapes) == n]) for n in (1, 2)]
    chosen = np.array([rng.choice(by_count[int(rng.random() > _P_ONE_SHAPE)]) for _ in range(batch)])
    used, ids = word_scenes([pool.scenes[i] for i in chosen], tokenizer, rng, long)
    clean = torch.from_numpy(pool.latents[chosen[used]]).float()
    noise = torch.randn(clean.shape, generator=generator)
    sigmas = draw_sigmas(batch, generator)
    level = sigmas[:, None, None, None]
    with torch.autocast("cpu", torch.bfloat16):
        predicted = model((1 - level) * clean + level * noise, 1 - sigmas, ids)
    error = (predicted.float() - (clean - noise)).square()
    ground = clean.flatten(2).median(-1).values[..., None, None]
    weight = 1 + shape_weight * ((clean - ground).abs().mean(1, keepdim=True) > _SHAPE_CELL).float()
    loss = (error * weight).mean() / weight.mean()
    if heads is not None and layout_weight > 0:
        height, width = clean.shape[2] * 8, clean.shape[3] * 8
        scenes = [pool.scenes[i] for i in chosen[used]]
        loss = loss + layout_weight * heads(model.features, scenes, width, height)
    return error.mean().detach(), loss


@torch.no_grad()
def quick_judge(
    model: TextToLatents,
    tokenizer: PreTrainedTokenizerBase,
    *,
    width: int,
    height: int,
    count: int,
    sheet: Path,
) -> dict[str, float]:
    """Share of held-out captions whose promises are kept, by attribute; also writes a contact sheet.

    The patch code decodes: its blocky edges do not disturb the checker, and no autoencoder is needed yet.
    """
    code = load_patch_code()
    rng = np.random.default_rng(4242)
    scenes = [sample_scene(rng, held_out=True, num_shapes=1 if i % 4 else 2) for i in range(count)]
    captions = [write_caption(scene, rng, held_out=True, complete=True) for scene in scenes]
    verdicts, pictures = [], []
    for start in range(0, count, 16):
        part = captions[start : start + 16]
        with torch.autocast("cpu", torch.bfloat16):
            drawn = sample_pictures(
                model.transformer,
                lambda prompts: model.encode_text([encode_prompt(p, tokenizer) for p in prompts]),
                code.decode,
                [c.text for c in part],
                width=width,
                height=height,
                first_seed=start,
            )
        pictures += drawn
        verdicts += [judge_picture(picture, caption) for picture, caption in zip(drawn, part, strict=True)]
    write_sheet(sheet, pictures[:32], captions[:32])
    names = ("ground", "colour", "kind", "size", "place", "count", "everything")
    return {name: float(np.mean([getattr(v, name) for v in verdicts])) for name in names}


def write_sheet(path: Path, pictures: list[np.ndarray], captions: list[Caption], *, columns: int = 8) -> None:
    """A contact sheet PNG, row by row; the captions go into a text file beside it."""
    rows = [np.hstack(pictures[i : i + columns]) for i in range(0, len(pictures) - columns + 1, columns)]
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.vstack(rows)[..., ::-1])
    path.with_suffix(".txt").write_text("\n".join(f"{i}: {c.text}" for i, c in enumerate(captions)) + "\n")


def relative_rate(step: int, steps: int, decay: int) -> float:
    """Of the peak: warm-up, plateau, linear decay to zero over the last `decay` steps."""
    return min(1.0, (step + 1) / _WARM_UP_STEPS, max(0.0, (steps - step) / decay))


def parse_stages(text: str) -> list[Stage]:
    """ "0:128x128*1*32;3000:256x256*2*16,384x256*1*10" -> stages; each size is WxH*weight*batch."""
    stages = []
    for part in text.split(";"):
        first, sizes = part.split(":")
        fields = [size.split("*") for size in sizes.split(",")]
        width_height = [tuple(map(int, f[0].split("x"))) for f in fields]
        weights = np.array([float(f[1]) for f in fields])
        stages.append(
            Stage(
                int(first),
                tuple((w, h) for w, h in width_height),
                tuple(weights / weights.sum()),
                tuple(int(f[2]) for f in fields),
            )
        )
    return stages


STAGES = "0:128x128*3*24,192x128*1*16,128x192*1*16;3000:256x256*2*12,384x256*1*8,256x384*1*8"


def train(rank: int, arguments: argparse.Namespace) -> None:
    """Train from the checkpoint, or from the start, as one of `arguments.processes` equal workers.

    Workers split every batch and meet once a step to average gradients: on a CPU that wastes less than many threads
    meeting in every operation. Worker 0 keeps the average of the weights, saves and looks at pictures.
    """
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // arguments.processes))
    if arguments.processes > 1:
        address = f"file://{arguments.checkpoint.resolve()}.meeting"
        dist.init_process_group("gloo", init_method=address, rank=rank, world_size=arguments.processes)
    torch.manual_seed(arguments.seed)
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer, local_files_only=True)
    stages = parse_stages(arguments.stages)
    pools: dict[tuple[int, int], LatentPool] = {}
    model = TextToLatents(len(tokenizer))
    averaged = TextToLatents(len(tokenizer)).requires_grad_(False)
    heads = DeepLayoutHeads(TRANSFORMER_CONFIG.dim)
    shares = share_matrices(muon_matrices(model.transformer), arguments.processes)
    matrices = {id(p) for share in shares for p in share}
    rest = [p for p in model.transformer.parameters() if id(p) not in matrices]
    groups = [
        {"params": rest, "scale": arguments.rate},
        {"params": list(model.text_encoder.parameters()), "scale": arguments.rate * arguments.text_rate},
        {"params": list(heads.parameters()), "scale": arguments.rate},
    ]
    optimizer = torch.optim.AdamW(groups, lr=arguments.rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    muon = torch.optim.Muon(
        [{"params": shares[rank], "scale": arguments.muon_rate}],
        lr=arguments.muon_rate,
        weight_decay=0.0,
        adjust_lr_fn="match_rms_adamw",
    )
    muon_state = arguments.checkpoint.with_suffix(f".muon{rank}.pt")
    first_step = arguments.first_step
    if arguments.start_from is not None:
        model.load_state_dict(load_checkpoint(arguments.start_from)["model"])
    if arguments.text_encoder is not None:
        model.text_encoder.load_state_dict(load_checkpoint(arguments.text_encoder)["encoder"])
    averaged.load_state_dict(model.state_dict())
    if arguments.checkpoint.exists():
        saved = load_checkpoint(arguments.checkpoint)
        model.load_state_dict(saved["model"])
        averaged.load_state_dict(saved["averaged"])
        heads.load_state_dict(saved["heads"])
        scales = [group["scale"] for group in [*optimizer.param_groups, *muon.param_groups]]
        optimizer.load_state_dict(saved["optimizer"])
        muon.load_state_dict(load_checkpoint(muon_state)["optimizer"])
        for group, scale in zip([*optimizer.param_groups, *muon.param_groups], scales, strict=True):
            group["scale"] = scale  # as asked now, not as it was saved
        first_step = saved["step"]
    if arguments.compile:
        torch._dynamo.config.recompile_limit = 64  # one graph for every picture size and caption length
        for block in [*model.transformer.noise_refiner, *model.transformer.layers]:
            block.forward = torch.compile(block.forward, dynamic=False)  # hooks stay outside
    averages, sources = list(averaged.parameters()), list(model.parameters())
    gradients = share_gradient_buffer([*sources, *heads.parameters()])
    buffers = [share_buffer(share) for share in shares]

    running, spent, last_look = None, 0.0, time.monotonic()
    for step in range(first_step, arguments.steps):
        began = time.monotonic()
        common = np.random.default_rng((arguments.seed, step))  # the same in every worker
        rng = np.random.default_rng((arguments.seed, step, rank))
        generator = torch.Generator().manual_seed((arguments.seed * 1_000_003 + step) * 64 + rank)
        stage = [s for s in stages if s.first_step <= step][-1]
        choice = int(common.choice(len(stage.sizes), p=stage.weights))
        size = stage.sizes[choice]
        long = size == (256, 256) and bool(common.random() < _P_LONG_CAPTIONS)
        if size not in pools:
            pools[size] = load_pool(arguments.pools, *size)
        done, whole_run = step - arguments.first_step, arguments.steps - arguments.first_step
        for group in [*optimizer.param_groups, *muon.param_groups]:
            group["lr"] = group["scale"] * relative_rate(done, whole_run, arguments.decay)
        batch = stage.batches[choice] // arguments.processes
        gradients.zero_()
        helpers = (heads, arguments.layout_weight, arguments.shape_weight)
        error, loss = flow_loss(model, pools[size], tokenizer, batch, long, rng, generator, *helpers)
        loss.backward()
        if arguments.processes > 1:
            dist.all_reduce(gradients)
            gradients /= arguments.processes
        nn.utils.clip_grad_norm_(sources, 1.0)
        optimizer.step()
        muon.step()
        if arguments.processes > 1:
            for owner, buffer in enumerate(buffers):
                dist.broadcast(buffer, src=owner)
        value, whole = float(error), float(loss.detach())
        running = value if running is None else 0.99 * running + 0.01 * value
        spent += time.monotonic() - began
        last = step + 1 == arguments.steps
        save = last or (step + 1) % arguments.save_every == 0
        if save:
            save_checkpoint(muon_state, {"optimizer": muon.state_dict()})
        if rank > 0:
            continue

        decay = min(_EMA_DECAY, (1 + done) / (10 + done))
        torch._foreach_lerp_(averages, sources, 1 - decay)
        if (step + 1) % 25 == 0:
            print(f"step {step + 1} loss {running:.4f} ({whole:.3f}) {spent / 25:.3f} s/step", flush=True)
            spent = 0.0
        if save:
            state = {"model": model.state_dict(), "averaged": averaged.state_dict()}
            save_checkpoint(
                arguments.checkpoint,
                {**state, "heads": heads.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1},
            )
        if last or time.monotonic() - last_look > arguments.look_minutes * 60:
            width, height = stage.sizes[0]
            sheet = arguments.checkpoint.parent / "looks" / f"{arguments.checkpoint.stem}_{step + 1:06d}.png"
            shares = quick_judge(averaged, tokenizer, width=width, height=height, count=48, sheet=sheet)
            words = " ".join(f"{name} {share:.2f}" for name, share in shares.items())
            print(f"step {step + 1} held-out {width}x{height}: {words}", flush=True)
            last_look = time.monotonic()
    if arguments.processes > 1:
        dist.destroy_process_group()


def muon_matrices(transformer: ZImageTransformer) -> list[nn.Parameter]:
    """The matrices between hidden states: Muon is made for these, not for embedders, modulation and the output."""
    return [p for name, p in transformer.named_parameters() if p.ndim == 2 and _MUON_NAMES & set(name.split("."))]


def share_matrices(matrices: list[nn.Parameter], workers: int) -> list[list[nn.Parameter]]:
    """Deal the matrices out so that every worker gets about the same number of values."""
    shares: list[list[nn.Parameter]] = [[] for _ in range(workers)]
    for matrix in sorted(matrices, key=lambda m: -m.numel()):
        min(shares, key=lambda share: sum(m.numel() for m in share)).append(matrix)
    return shares


def share_buffer(parameters: list[nn.Parameter]) -> Tensor:
    """One flat tensor that all parameters are views of, so that they are sent in a single message."""
    flat = torch.cat([p.detach().flatten() for p in parameters])
    offset = 0
    for parameter in parameters:
        parameter.data = flat[offset : offset + parameter.numel()].view_as(parameter)
        offset += parameter.numel()
    return flat


def share_gradient_buffer(parameters: list[nn.Parameter]) -> Tensor:
    """One flat tensor that all gradients are views of, so that workers average them in a single exchange."""
    flat = torch.zeros(sum(p.numel() for p in parameters))
    offset = 0
    for parameter in parameters:
        parameter.grad = flat[offset : offset + parameter.numel()].view_as(parameter)
        offset += parameter.numel()
    return flat


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=9000)
    parser.add_argument("--decay", type=int, default=2500, help="steps over which the rate falls to zero at the end")
    parser.add_argument("--rate", type=float, default=1e-3, help="AdamW's")
    parser.add_argument("--muon-rate", type=float, default=3e-3, help="Muon's, on AdamW's scale")
    parser.add_argument("--text-encoder", type=Path, help="what train_text wrote; random when left out")
    parser.add_argument("--text-rate", type=float, default=0.2, help="rate of the text encoder, relative")
    parser.add_argument("--start-from", type=Path, help="weights of another run of this script to begin with")
    parser.add_argument("--first-step", type=int, default=0, help="number of the first step after --start-from")
    parser.add_argument("--layout-weight", type=float, default=0.15, help="of the dense second task, see layout.py")
    parser.add_argument("--shape-weight", type=float, default=3.0, help="extra weight of cells that show a shape")
    parser.add_argument("--stages", default=STAGES, help="FIRST_STEP:WxH*WEIGHT*BATCH,...;...")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--look-minutes", type=float, default=8.0, help="between two looks at held-out pictures")
    parser.add_argument("--save-every", type=int, default=250)
    parser.add_argument("--pools", type=Path, default=Path("work/pools"))
    parser.add_argument("--tokenizer", type=Path, default=Path("work/text_encoder"))
    parser.add_argument("--checkpoint", type=Path, default=Path("work/flow.pt"))
    parser.add_argument("--processes", type=int, default=1, help="workers that share every batch")
    arguments = parser.parse_args()
    Path(f"{arguments.checkpoint.resolve()}.meeting").unlink(missing_ok=True)
    if arguments.processes > 1:
        mp.spawn(train, (arguments,), nprocs=arguments.processes)
    else:
        train(0, arguments)


if __name__ == "__main__":
    main()
