"""diffusers' whole program on a preset's files, in a process of its own: loaded, placed its way, one picture drawn.

    python -m models.z_image.bench.peer_program "group offload, blocks" --cap 6.0 --resolution 1024x1024 --steps 8
        --prompt "..." --transformer FILE --text-encoder FILE --vae FILE [--device cuda] [--picture FILE]

The last line is one JSON object with the fields of `wgp.py generate --json` that the measuring program reads. Files are
those that our program draws with, read by the peer's own classes; what they cannot read (packed weights) is an error
that says so.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from models.z_image import autoencoder
from models.z_image.loader import load_transformer
from models.z_image.text_encoder import load_text_encoder, load_tokenizer
from models.z_image.vae_names import diffusers_names
from shared.quant.linear import PackedLinear

_MIB = 2**20
_MODULE = re.compile(r"^.*?(?=(?:embed_tokens|layers|norm)\.)")  # what stands before Qwen3's own names

# Qwen3's, for one question, where no file beside the tokenizer has it.
_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# Where the peer can keep its weights. Group offload fetches ahead on a stream of its own where there is a GPU.
Place = Callable[[Any, torch.device], None]


def _group(pipeline: Any, device: torch.device, kind: str) -> None:
    blocks = 1 if kind == "block_level" else None
    pipeline.enable_group_offload(
        onload_device=device, offload_type=kind, num_blocks_per_group=blocks, use_stream=device.type == "cuda"
    )


WHOLE = "all on the GPU"
PLACES: Mapping[str, Place] = {
    WHOLE: lambda pipeline, device: pipeline.to(device),
    "model offload": lambda pipeline, device: pipeline.enable_model_cpu_offload(device=device),
    "sequential offload": lambda pipeline, device: pipeline.enable_sequential_cpu_offload(device=device),
    "group offload, blocks": lambda pipeline, device: _group(pipeline, device, "block_level"),
    "group offload, leaves": lambda pipeline, device: _group(pipeline, device, "leaf_level"),
}


def main(argv: list[str]) -> None:
    args = _arguments(argv)
    device = torch.device(args.device)
    if device.type == "cuda":
        torch.cuda.init()
        if args.cap:
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, args.cap * 1e9 / total))
    width, height = (int(side) for side in args.resolution.split("x"))
    with torch.no_grad():
        found = draw(
            load_pipeline(args.transformer, args.text_encoder, args.vae), PLACES[args.place], device,
            prompt=args.prompt, width=width, height=height, steps=args.steps, picture=args.picture,
        )  # fmt: skip
    sys.stdout.write("\n" + json.dumps(found) + "\n")


def load_pipeline(transformer: Path, text_encoder: Path, vae: Path) -> Callable[[], Any]:
    """A call that loads diffusers' pipeline in bf16. Sizes are read before. Raises ValueError for packed files."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Model

    ours: list[nn.Module] = [
        load_transformer(transformer, torch.bfloat16, keep_mapped=True),
        load_text_encoder(text_encoder, torch.bfloat16, keep_mapped=True),
    ]
    if any(isinstance(module, PackedLinear) for model in ours for module in model.modules()):
        raise ValueError("diffusers' classes read no packed weights")
    network: Any = ours[0].config
    words: Any = ours[1].config
    words.num_hidden_layers += 1  # ours leaves out the last, which the peer's pipeline runs
    words.layer_types = None
    words = type(words)(**{**words.to_dict(), "attn_implementation": "sdpa"})
    sizes = dict(autoencoder.load_vae(vae, torch.bfloat16).config)
    del ours

    def load() -> Any:
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "config.json").write_text(json.dumps(network.as_diffusers()), encoding="utf-8")
            drawing = ZImageTransformer2DModel.from_single_file(
                str(transformer), config=folder, torch_dtype=torch.bfloat16, local_files_only=True
            )
        reading = _filled(Qwen3Model, words, {_MODULE.sub("", n): t for n, t in load_file(text_encoder).items()})
        with torch.device("meta"):
            decoding = AutoencoderKL(**{key: value for key, value in sizes.items() if not key.startswith("_")})
        stored = load_file(vae)
        shapes = {name: p.shape for name, p in decoding.named_parameters()}
        named = {n: stored[given].reshape(shapes[n]) for n, given in diffusers_names(stored).items() if n in shapes}
        decoding = _assigned(decoding, named)
        scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0, use_dynamic_shifting=False)
        tokenizer = load_tokenizer(text_encoder.parent)
        if tokenizer.chat_template is None:
            tokenizer.chat_template = _CHAT
        return ZImagePipeline(scheduler, decoding, reading, tokenizer, drawing)

    return load


def draw(
    load: Callable[[], Any],
    place: Place,
    device: torch.device,
    *,
    prompt: str,
    width: int,
    height: int,
    steps: int,
    picture: Path | None,
) -> dict[str, Any]:
    """Seconds by stage, forwards, and the most memory in MiB that tensors took on the GPU."""
    began = [time.perf_counter()]

    def lap() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()
        began.append(time.perf_counter())

    pipeline = load()
    pipeline.set_progress_bar_config(disable=True)
    place(pipeline, device)
    lap()
    features, _ = pipeline.encode_prompt(prompt, device=device, do_classifier_free_guidance=False)
    lap()
    noise = torch.randn(1, 16, height // 8, width // 8, generator=torch.Generator().manual_seed(0))
    latents = pipeline(
        height=height, width=width, num_inference_steps=steps, guidance_scale=0.0, prompt_embeds=features,
        latents=noise.to(device), output_type="latent", return_dict=False,
    )[0]  # fmt: skip
    lap()
    vae = pipeline.vae
    z = latents.to(vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
    decoded = vae.decode(z, return_dict=False)[0]
    pipeline.image_processor.postprocess(decoded)[0].save(picture or Path(tempfile.gettempdir(), "peer.png"))
    lap()
    names = ("load", "text", "denoise", "decode")
    seconds = {name: b - a for name, a, b in zip(names, began, began[1:], strict=False)}
    found: dict[str, Any] = {"seconds": {name: round(s, 3) for name, s in seconds.items()}, "forwards": steps}
    if device.type == "cuda":
        found["peak_vram_mb"] = round(torch.cuda.max_memory_allocated() / _MIB, 1)
    return found


def _filled(build: Any, config: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = build(config)
    return _assigned(model, tensors)


def _assigned(model: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The model with these numbers in bf16, all of its own names; what else is in a file (a language head) is left."""
    wanted = model.state_dict().keys()
    model.load_state_dict({n: t.to(torch.bfloat16) for n, t in tensors.items() if n in wanted}, assign=True)
    return model.eval().requires_grad_(False)


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Draw a picture with diffusers from a preset's files.")
    parser.add_argument("place", choices=sorted(PLACES))
    parser.add_argument("--cap", type=float, default=0.0, help="GPU memory to use at most, 10^9 bytes; 0: all")
    parser.add_argument("--resolution", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--picture", type=Path)
    for role in ("transformer", "text-encoder", "vae"):
        parser.add_argument(f"--{role}", type=Path, required=True)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(sys.argv[1:])
