"""What people add to a plain picture, beside the same in diffusers: guidance, NAG, LoRAs, a ControlNet.

What is timed is the loop from noise to latents; reading the prompt and decoding are as ever.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from models.z_image.bench import loras, twins
from models.z_image.bench.stand import Stand
from models.z_image.bench.twins import Scene, Twins
from models.z_image.control import ControlSignal
from models.z_image.control_loader import load_control
from models.z_image.guidance import ClassifierFreeGuidance, NormalizedAttentionGuidance
from models.z_image.lora import LoraSet
from shared.quant.assemble import Storage
from shared.quant.checkpoint import Checkpoint

if TYPE_CHECKING:
    from models.z_image.conditions import Encode, Signals

BASE_STEPS = 30
_SHIFT, _SCALE = 6.0, 4.0  # of Base
_NAG_SCALE = 4.0
_LORAS = (1, 3)
_STRENGTH = 0.25  # what a LoRA adds together with others
_CONTROL_WEIGHT = 0.75
_PLACES = 5  # Union 1.0 has a control layer for every fifth of the network's

# A loop takes seconds.
_REPEATS = 3


def variations(stand: Stand, both: Twins, given: Scene, row: str, base_steps: int = BASE_STEPS) -> None:
    """A comparison each, behind the row's name."""
    negative = given.features.flip(0)
    contenders: dict[str, Callable[[], Tensor]] = {
        "ours": twins.our_loop(
            both.ours, given, base_steps, guidance=ClassifierFreeGuidance(scale=_SCALE), shift=_SHIFT, negative=negative
        ),
        "P1": twins.their_loop(both.theirs, given, base_steps, guidance=_SCALE, shift=_SHIFT, negative=negative),
    }  # fmt: skip
    facts = {who: {"forwards": 2 * base_steps} for who in contenders}
    stand.compare(f"{row}, Base, {base_steps} steps, guided", contenders, reference="P1", facts=facts, repeats=_REPEATS)
    nag = NormalizedAttentionGuidance(scale=_NAG_SCALE)
    contenders = {"ours": twins.our_loop(both.ours, given, nag=nag, negative=negative)}
    stand.compare(f"{row}, NAG", contenders, repeats=_REPEATS)
    for count in _LORAS:
        _with_loras(stand, both, given, row, count)
    _controlled(stand, both, given, row)


def _with_loras(stand: Stand, both: Twins, given: Scene, row: str, count: int) -> None:
    files = [
        loras.write(stand.folder / f"lora_{i}.safetensors", both.ours, loras.RANK, seed=i) for i in range(count)
    ]  # fmt: skip
    changed = _sharing(both.ours)
    LoraSet(changed).apply(files, [_STRENGTH] * count)
    contenders = {"ours": twins.our_loop(changed, given)}
    if stand.wants("P1"):
        contenders["P1"] = twins.lazily(lambda: twins.their_loop(_with_peft(both.theirs, files), given))
    title = f"{count} LoRA{'s' if count > 1 else ''} of rank {loras.RANK}"
    stand.compare(f"{row}, {title}", contenders, reference="P1", repeats=_REPEATS)


def _with_peft(theirs: Any, files: Sequence[Path]) -> Any:
    model = _sharing(theirs)
    names = [file.stem for file in files]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are what is wanted
        for name, file in zip(names, files, strict=True):
            model.load_lora_adapter(file, adapter_name=name)
    model.set_adapters(names, [_STRENGTH] * len(names))
    return model


def _controlled(stand: Stand, both: Twins, given: Scene, row: str) -> None:
    """Union 1.0's branch: the one whose hints both programs add alike (see control.py)."""
    from diffusers import ZImageControlNetModel

    config = both.config
    with torch.device("meta"):
        branch = ZImageControlNetModel(
            control_layers_places=list(range(0, config.n_layers, _PLACES)), control_in_dim=config.in_channels,
            dim=config.dim, n_refiner_layers=config.n_refiner_layers, n_heads=config.n_heads, n_kv_heads=config.n_heads,
        )  # fmt: skip
    branch = branch.to_empty(device=stand.device).to(both.ours.dtype).eval().requires_grad_(False)
    twins.randomise(branch, 5)
    path = stand.folder / "control.safetensors"
    save_file({n: t.cpu() for n, t in branch.state_dict().items() if n.startswith("control_")}, path)
    ours = _sharing(both.ours)
    ours.control = load_control(Checkpoint.open(path), config, Storage(dtype=both.ours.dtype)).to(stand.device)
    context = given.latents.flip(-1).to(both.ours.dtype)
    contenders = {"ours": twins.our_loop(ours, given, control=_Control(ControlSignal(context, _CONTROL_WEIGHT)))}
    if stand.wants("P1"):
        controlnet = ZImageControlNetModel.from_transformer(branch, both.theirs)
        contenders["P1"] = twins.lazily(lambda: _their_controlled_loop(both.theirs, controlnet, given, context))
    stand.compare(f"{row}, ControlNet", contenders, reference="P1", repeats=_REPEATS)


class _Control:
    """A control picture that is encoded already, and counts in every step."""

    def __init__(self, signal: ControlSignal) -> None:
        self._signal = signal

    def begin(self, encode: Encode) -> Signals:
        return lambda share: self._signal


def _their_controlled_loop(theirs: Any, controlnet: Any, given: Scene, context: Tensor) -> Callable[[], Tensor]:
    """diffusers' pipeline with a VAE that has encoded the picture already."""
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImageControlNetPipeline

    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0, use_dynamic_shifting=False)
    pipeline = ZImageControlNetPipeline(scheduler, None, None, None, theirs, controlnet)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.vae = SimpleNamespace(
        dtype=context.dtype, config=SimpleNamespace(shift_factor=0.0, scaling_factor=1.0),
        encode=lambda picture: SimpleNamespace(latents=context),
    )  # fmt: skip
    height, width = (8 * side for side in context.shape[-2:])
    picture = torch.zeros(1, 3, height, width)
    features, noise = [given.features.to(context.dtype)], twins.noise_of(given)

    def loop() -> Tensor:
        answer = pipeline(
            height=height, width=width, num_inference_steps=twins.TURBO_STEPS, guidance_scale=0.0,
            control_image=picture, controlnet_conditioning_scale=_CONTROL_WEIGHT, prompt_embeds=features,
            latents=noise.clone(), output_type="latent", return_dict=False,
        )  # fmt: skip
        found: Tensor = answer[0].float()
        return found

    return loop


def _sharing(model: Any) -> Any:
    """A copy with the same weights, to hang something on."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})
