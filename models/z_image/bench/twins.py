"""Our network and diffusers' on the very same weights, and copies of them in other kinds of weight.

Weights are normally distributed, scaled so that activations keep their size from layer to layer: speed and memory do
not depend on values, but overflows, denormals and quantisers would.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from models.z_image.config import TransformerConfig
from models.z_image.cuda_graph import GraphedForwards
from models.z_image.guidance import ClassifierFreeGuidance, NormalizedAttentionGuidance
from models.z_image.keys import diffusers_names, split_parameter
from models.z_image.noise import NoiseSource
from models.z_image.pipeline import ZImagePipeline
from models.z_image.prediction import Predictor, Prompts
from models.z_image.request import GenerateRequest
from models.z_image.text_encoder import TextEncoder
from models.z_image.transformer import ZImageTransformer
from shared.ops.graphs import CudaRecorder
from shared.quant.checkpoint import Checkpoint
from shared.quant.formats import format_of, layers_of, read_checked, svdq
from shared.quant.kernels.resolve import resolve
from shared.quant.linear import PackedLinear
from shared.quant.packing import Packed
from shared.quant.targets import targets

# Linears that a published packed file packs: those of attention and feed-forward. The others are small.
PACKED = re.compile(
    r"(?:layers|noise_refiner|context_refiner)\.\d+\.(?:attention\.(?:qkv|out)|feed_forward\.(?:w13|w2))"
)
_PARTS = {"qkv": 3, "w13": 2}

TURBO_STEPS = 8


@dataclass(frozen=True, slots=True)
class Twins:
    """theirs: diffusers' ZImageTransformer2DModel, whose numbers `ours` has."""

    ours: ZImageTransformer
    theirs: Any

    @property
    def config(self) -> TransformerConfig:
        return self.ours.config


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """Inputs of a forward: latents (B, 16, h, w) and the features (tokens, width) of their one caption, float32."""

    latents: Tensor
    features: Tensor

    @property
    def tokens(self) -> int:
        """Tokens of the joint sequence, both streams padded."""
        return image_tokens(self.latents) + padded(len(self.features))


def sized(dim: int, layers: int, *, heads: int, refiners: int = 2, features: int = 2560) -> TransformerConfig:
    """A config that diffusers can build too: it derives the other sizes from dim."""
    head = dim // heads
    first = head // 4 // 2 * 2
    second = (head - first) // 2 // 2 * 2
    return TransformerConfig(
        dim=dim, n_layers=layers, n_refiner_layers=refiners, n_heads=heads, cap_feat_dim=features,
        ffn_dim=int(dim / 3 * 8), time_dim=min(dim, 256), axes_dims=(first, second, head - first - second),
    )  # fmt: skip


def make(config: TransformerConfig, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Twins:
    """Both networks in `dtype` on `device`."""
    from diffusers import ZImageTransformer2DModel

    fields = {name: value for name, value in config.as_diffusers().items() if not name.startswith("_")}
    with torch.device("meta"):
        theirs = ZImageTransformer2DModel(**fields)
        ours = ZImageTransformer(config)
    theirs = theirs.to_empty(device=device).to(dtype).eval().requires_grad_(False)
    randomise(theirs, seed)
    return Twins(_ours_of(theirs, ours), theirs)


def randomise(module: nn.Module, seed: int) -> None:
    """Matrices that keep the size of what they multiply, norms of ones, small biases and pad tokens."""
    device = next(module.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in module.named_parameters():
        if parameter.dim() > 1 and not name.endswith("pad_token"):
            parameter.data.normal_(generator=generator).mul_(parameter[0].numel() ** -0.5)
        elif "norm" in name and name.endswith("weight"):
            parameter.data.fill_(1.0)
        else:
            parameter.data.normal_(generator=generator).mul_(0.02)


def _ours_of(theirs: nn.Module, ours: ZImageTransformer) -> ZImageTransformer:
    """Fill our network, built on meta, from diffusers'; what is fused here is copied, the rest is shared."""
    state = theirs.state_dict()
    for name, _ in list(ours.named_parameters()):
        module, parameter = split_parameter(name)
        parts = [state[their + parameter] for their in diffusers_names(module)]
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        owner, _, attribute = name.rpartition(".")
        setattr(ours.get_submodule(owner), attribute, nn.Parameter(tensor, requires_grad=False))
    return ours.eval()


def in_float32(theirs: Any) -> Any:
    """The same numbers computed in float32: what errors are measured against."""
    return copy.deepcopy(theirs).float()


def scene(config: TransformerConfig, *, width: int, height: int, caption: int, device: torch.device) -> Scene:
    """width, height: pixels. caption: tokens."""
    generator = torch.Generator(device).manual_seed(1)
    shape = (1, config.in_channels, height // 8, width // 8)
    latents = torch.randn(shape, generator=generator, device=device)
    features = torch.randn(caption, config.cap_feat_dim, generator=generator, device=device)
    return Scene(latents=latents, features=features)


def our_forward(
    ours: ZImageTransformer, given: Scene, *, at: int = 3, steps: int = TURBO_STEPS
) -> Callable[[], Tensor]:
    """One forward as the denoising loop makes it, after `at` of `steps` steps: the velocity (B, 16, h, w)."""
    sigmas = _request(given, steps).noise_levels()
    captions = ours.encode_captions([given.features.to(ours.dtype)]).repeat(len(given.latents))
    recordings = _recordings(ours, given.latents.device)
    predict = Predictor(
        recordings or ours, Prompts(positive=captions), sigmas=sigmas,
        guidance=ClassifierFreeGuidance(), nag=NormalizedAttentionGuidance(),
    )  # fmt: skip
    return lambda: predict(given.latents, sigmas[at])


def their_forward(theirs: Any, given: Scene, *, at: int = 3, steps: int = TURBO_STEPS) -> Callable[[], Tensor]:
    """The same forward as diffusers' pipeline makes it. Source: diffusers 0.42.1 pipeline_z_image.py, __call__."""
    sigma = _request(given, steps).noise_levels()[at]
    dtype = next(theirs.parameters()).dtype
    pictures = len(given.latents)
    time = torch.full((pictures,), 1 - sigma, dtype=torch.float32, device=given.latents.device)
    features = [given.features.to(dtype)] * pictures

    def forward() -> Tensor:
        images = list(given.latents.to(dtype).unsqueeze(2).unbind(dim=0))
        answers = theirs(images, time, features, return_dict=False)[0]
        return -torch.stack([answer.float() for answer in answers]).squeeze(2)

    return forward


def our_loop(
    ours: ZImageTransformer,
    given: Scene,
    steps: int = TURBO_STEPS,
    *,
    negative: Tensor | None = None,
    **settings: Any,
) -> Callable[[], Tensor]:
    """All steps of a picture, from noise to latents, the prompt being encoded already.

    negative: the negative prompt's features. settings: of the GenerateRequest besides.
    """
    pipeline = ZImagePipeline(ours, no_encoder(), None, given.latents.device)
    pipeline.recordings = _recordings(ours, given.latents.device)
    request, features = replace(_request(given, steps), **settings), given.features.to(ours.dtype)
    against = None if negative is None else negative.to(ours.dtype)

    def loop() -> Tensor:
        *_, last = pipeline.denoise(request, features, against)
        return last.latents

    return loop


def _recordings(ours: ZImageTransformer, device: torch.device) -> GraphedForwards | None:
    """What a GPU replays forwards from, as the program has it where no weights are streamed."""
    if device.type != "cuda":
        return None
    found = GraphedForwards(ours, CudaRecorder(device))
    found.begin()
    return found


def no_encoder() -> TextEncoder:
    """An encoder for those who bring their prompts encoded."""
    tokenizer: Any = None
    return TextEncoder(nn.Identity(), tokenizer)


def their_loop(
    theirs: Any,
    given: Scene,
    steps: int = TURBO_STEPS,
    *,
    shift: float = 3.0,
    guidance: float = 0.0,
    negative: Tensor | None = None,
) -> Callable[[], Tensor]:
    """The same by diffusers' pipeline, from the same noise."""
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers import ZImagePipeline as TheirPipeline

    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift, use_dynamic_shifting=False)
    pipeline = TheirPipeline(scheduler, None, None, None, theirs)
    pipeline.set_progress_bar_config(disable=True)
    request, noise = _request(given, steps), noise_of(given)
    dtype = next(theirs.parameters()).dtype
    features = [given.features.to(dtype)]
    against = None if negative is None else [negative.to(dtype)]

    def loop() -> Tensor:
        answer = pipeline(
            height=request.height, width=request.width, num_inference_steps=steps, guidance_scale=guidance,
            prompt_embeds=list(features), negative_prompt_embeds=against and list(against), latents=noise.clone(),
            output_type="latent", return_dict=False,
        )  # fmt: skip
        return answer[0].float()

    return loop


def noise_of(given: Scene) -> Tensor:
    """The noise that our loop starts from, on the device."""
    shape = tuple(given.latents.shape[1:])
    noise = NoiseSource(_request(given, 1).seeds, shape).start()  # type: ignore[arg-type]
    return noise.to(given.latents.device)


def lazily(make: Callable[[], Callable[[], Tensor]]) -> Callable[[], Tensor]:
    """A contender that is made when it is first called: one whose library fails then fails alone."""
    made: list[Callable[[], Tensor]] = []

    def call() -> Tensor:
        if not made:
            made.append(make())
        return made[0]()

    return call


def raw(ours: ZImageTransformer, given: Scene) -> Callable[[], None]:
    """The bare products and attentions of a forward on the network's own matrices: no norms, gates or rotations."""
    config, dtype, device = ours.config, ours.dtype, given.latents.device
    image, caption = image_tokens(given.latents), padded(len(given.features))
    inputs: dict[tuple[int, int], Tensor] = {}

    def block(module: Any, tokens: int) -> None:
        for linear in (module.attention.qkv, module.attention.out, module.feed_forward.w13, module.feed_forward.w2):
            nn.functional.linear(_kept(inputs, (tokens, linear.in_features), dtype, device), linear.weight)
        shape = (tokens, config.dim)
        q = _kept(inputs, shape, dtype, device).view(1, tokens, config.n_heads, -1).transpose(1, 2)
        nn.functional.scaled_dot_product_attention(q, q, q)

    def forward() -> None:
        for module in ours.noise_refiner:
            block(module, image)
        for module in ours.layers:
            block(module, image + caption)

    return forward


def packed(
    ours: ZImageTransformer, kind: str, folder: Path, *, rank: int = 0, compute: str = "auto"
) -> ZImageTransformer:
    """The network with the linears of its blocks packed, all else shared with `ours`.

    kind: a format of shared/quant/targets.py. Kernels are chosen as at load, for the device of `ours`.
    """
    model = copy.deepcopy(ours, {id(p): p for p in ours.parameters()})
    device = ours.x_pad_token.device
    for name, module in list(ours.named_modules()):
        if PACKED.fullmatch(name) and isinstance(module, nn.Linear):
            matrix = _pack(module.weight, name.rpartition(".")[2], kind, folder, rank)
            owner, _, attribute = name.rpartition(".")
            layer = PackedLinear(matrix, None, ours.dtype, compute=compute).to(device)
            setattr(model.get_submodule(owner), attribute, layer)
    resolve([model], device, compute)
    return model


def expanded(model: ZImageTransformer) -> ZImageTransformer:
    """A packed network's weights as plain float32 matrices: the reference for what its kernels add."""
    plain = copy.deepcopy(model).float()
    for name, module in list(model.named_modules()):
        if isinstance(module, PackedLinear):
            linear = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
            linear.weight = nn.Parameter(module.packed.dequantize(torch.float32), requires_grad=False)
            owner, _, attribute = name.rpartition(".")
            setattr(plain.get_submodule(owner), attribute, linear)
    return plain


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the blocks' attention and feed-forward linears, as they are kept."""
    total = 0
    for name, module in model.named_modules():
        if PACKED.fullmatch(name):
            total += sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))
    return total


def kernels_of(model: nn.Module, device: torch.device) -> str:
    """The kernels that multiply a network's packed layers."""
    found = {m.kernel(device).name for m in model.modules() if isinstance(m, PackedLinear)}
    return ", ".join(sorted(found)) or "plain"


def image_tokens(latents: Tensor) -> int:
    return padded(latents.shape[-2] * latents.shape[-1] // 4)


def padded(tokens: int) -> int:
    return -(-tokens // 32) * 32


def linear_flops(config: TransformerConfig, tokens: int) -> float:
    """Of one block over so many tokens: multiplications and additions of its four products."""
    return 2.0 * tokens * config.dim * (4 * config.dim + 3 * config.ffn_dim)


def attention_flops(config: TransformerConfig, tokens: int) -> float:
    """Of one block: q k^T and its product with v."""
    return 4.0 * tokens * tokens * config.dim


def forward_flops(config: TransformerConfig, given: Scene) -> float:
    """Of a whole forward, refined captions given (their two blocks are computed once)."""
    image, joint = image_tokens(given.latents), given.tokens
    each = [(config.n_layers, joint), (config.n_refiner_layers, image)]
    return sum(n * (linear_flops(config, tokens) + attention_flops(config, tokens)) for n, tokens in each)


def _request(given: Scene, steps: int) -> GenerateRequest:
    height, width = given.latents.shape[-2:]
    return GenerateRequest(prompt="", width=8 * width, height=8 * height, steps=steps)


def _kept(
    inputs: dict[tuple[int, int], Tensor], shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    if shape not in inputs:
        inputs[shape] = torch.randn(shape, device=device).to(dtype)
    return inputs[shape]


def _pack(weight: Tensor, role: str, kind: str, folder: Path, rank: int) -> Packed:
    """A matrix in a format, by way of a file of it."""
    parts = _PARTS.get(role, 1)
    if kind.startswith("svdq"):  # one turn instead of five: as fast to compute with, and good enough for its error
        tensors = svdq.quantize(weight.float(), kind=kind.removeprefix("svdq_"), rank=rank, iterations=1, parts=parts)  # type: ignore[arg-type]
    else:
        tensors = targets()[kind].quantize(weight.float(), parts, rank)
    path = folder / "layer.safetensors"
    save_file({f"blocks.0.{suffix}": tensor.contiguous().cpu() for suffix, tensor in tensors.items()}, path)
    checkpoint = Checkpoint.open(path)
    layer = layers_of(checkpoint, checkpoint.tensors)["blocks.0"]
    found = format_of(layer)
    assert found is not None
    packed = read_checked(
        found, layer
    )  # its tensors may be mapped from the file, which is written anew for the next layer
    return Packed(packed.packing, packed.shape, {name: tensor.clone() for name, tensor in packed.tensors.items()})
