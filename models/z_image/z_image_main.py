"""model_factory: the object a host holds. It loads the three modules and turns generate()'s keywords into a picture."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from importlib import import_module, util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.z_image.autoencoder import load_vae
from models.z_image.cuda_graph import USUAL_MOST_TOKENS, GraphedForwards
from models.z_image.loader import load_transformer
from models.z_image.lora import Match, Strength
from models.z_image.omni import OmniTransformer
from models.z_image.omni_pipeline import OmniPipeline, load_siglip, siglip_folders
from models.z_image.pipeline import Step, ZImagePipeline
from models.z_image.request import GenerateRequest, from_host_kwargs
from models.z_image.text_encoder import FeatureStore, TextEncoder, load_text_encoder, load_tokenizer
from models.z_image.transformer import ZImageTransformer
from models.z_image.variants import TEXT_ENCODER_FILES, TEXT_ENCODER_FOLDER, VAE_FILE
from shared.ops.attention import BACKENDS, SDPA, fastest
from shared.ops.graphs import CudaRecorder
from shared.quant.errors import UserError
from shared.utils.files_locator import locate_file, locate_folder

# Where the parts are looked for when a caller names none: in a Wan2GP folder, then in a ComfyUI one.
_TEXT_ENCODERS = (f"{TEXT_ENCODER_FOLDER}/{TEXT_ENCODER_FILES[0]}", "text_encoders/qwen_3_4b.safetensors")
_VAES = (VAE_FILE, f"vae/{VAE_FILE}")

StepCallback = Callable[..., None]


class model_factory:
    """Loads a Z-Image model on construction; `generate` draws with it.

    transformer, text_encoder, vae: nn.Modules for an offloader to place. `device`: where they compute; "cuda" when
    there is one, as under mmgp, settable by the host. `_interrupt`: set to True from any thread, generate() returns
    None within one step.
    place_text_encoder: None loads the text encoder at once. Else `text_encoder` is None until a prompt needs it; it is
    then loaded and given to this function, which puts it where it computes. prompt_store: remembers encoded prompts.
    parts: what another model_factory of the same files has loaded and this one takes over: transformer, text_encoder,
    vae, tokenizer. keep_mapped, keep_apart: see load_transformer() and load_vae().
    safer: names of the remedies that an earlier drawing with these files needed (`report["safer"]`).
    """

    def __init__(
        self,
        *,
        model_filename: str | Path | Sequence[str | Path],
        model_type: str | None = None,
        base_model_type: str | None = None,
        model_def: Mapping[str, Any] | None = None,
        text_encoder_filename: str | Path | None = None,
        vae_filename: str | Path | None = None,
        tokenizer_folder: str | Path | None = None,
        dtype: torch.dtype | None = None,
        VAE_dtype: torch.dtype | None = None,
        place_text_encoder: Callable[[nn.Module], None] | None = None,
        prompt_store: FeatureStore | None = None,
        safer: Sequence[str] = (),
        parts: Mapping[str, Any] | None = None,
        keep_mapped: bool = False,
        keep_apart: bool = False,
        **_: Any,
    ) -> None:
        files = [model_filename] if isinstance(model_filename, (str, Path)) else list(model_filename)
        if not files or not files[0]:
            raise UserError("No transformer file was given.", "Pass model_filename=<path of a .safetensors file>.")
        self.model_type, self.base_model_type = model_type, base_model_type
        self.model_def = dict(model_def or {})
        paths = [_locate(f) for f in files]
        beside = paths[0].parent
        dtype = dtype or torch.bfloat16

        encoder_path = _first(
            "text encoder",
            text_encoder_filename,
            beside / "text_encoder" / "model.safetensors",
            *_TEXT_ENCODERS,
        )
        vae_path = _first("VAE", vae_filename, beside / "vae" / "diffusion_pytorch_model.safetensors", *_VAES)
        parts = parts or {}
        self.tokenizer = (
            parts["tokenizer"]
            if "tokenizer" in parts
            else load_tokenizer(_tokenizer_folder(tokenizer_folder, self.model_def, encoder_path))
        )
        load_encoder = partial(_load_text_encoder, encoder_path, dtype, place_text_encoder, keep_mapped)
        given_encoder = parts.get("text_encoder")
        if given_encoder is None and place_text_encoder is None:
            given_encoder = load_encoder()
        encoder = TextEncoder(given_encoder or load_encoder, self.tokenizer, prompt_store)
        self.vae: nn.Module = parts.get("vae") or load_vae(
            vae_path, VAE_dtype or torch.float32, keep_mapped=keep_mapped
        )
        self.transformer = parts.get("transformer") or load_transformer(
            paths, dtype, keep_mapped=keep_mapped, keep_apart=keep_apart
        )
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.pipeline = _pipeline_for(paths[0], self.transformer, encoder, self.vae, device, safer)
        self._interrupt = False

    @property
    def device(self) -> torch.device:
        return self.pipeline.device

    @device.setter
    def device(self, device: torch.device) -> None:
        self.pipeline.device = device

    @property
    def text_encoder(self) -> nn.Module | None:
        """Qwen3 without its last layer; None as long as it is not loaded."""
        return self.pipeline.text_encoder.loaded

    @property
    def report(self) -> dict[str, Any]:
        """Of the last generate(): `forwards` per picture, `sigmas`, `seconds` for text, denoise and decode, `notes`.

        `safer`: the remedies that bad numbers made necessary, by name, in words; see safety.py.
        """
        return asdict(self.pipeline.report)

    def generate(
        self,
        *,
        callback: StepCallback | None = None,
        loras_slists: Any = None,
        set_progress_status: Callable[[str], None] | None = None,
        **kwargs: Any,
    ) -> Tensor | None:
        """Draw: (3, N, H, W) float32 in [-1, 1] for a batch of N, or None when interrupted.

        Keywords are the host's (wan2gp-contract C1d); request.py reads the ones that matter here. callback is called
        as callback(-1, None, True, steps) first, then callback(i, latents of the first picture (16, 1, h, w), False).
        A step whose numbers were bad comes again, and with it its callback. set_progress_status is told what is done
        otherwise than asked. Raises UserError for what cannot be drawn, NumbersError for numbers that stay bad.
        """
        request = self._request(kwargs)
        announce: Callable[[int], None] | None = None
        tell = set_progress_status or (lambda note: None)

        def on_begin(steps: int) -> None:
            nonlocal announce
            announce = _host_lora_steps(self.transformer, loras_slists, steps)
            if callback is not None:
                callback(-1, None, True, steps)
            announce(0)

        def on_step(step: Step) -> None:
            if callback is not None:
                callback(step.index, step.latents[0][:, None], False)
            if announce is not None and step.index + 1 < step.total:
                announce(step.index + 1)
                if getattr(self.transformer, "_loras_active_adapters", None):  # mmgp's name for LoRAs that are on
                    self.pipeline.weights_changed()

        def on_repeat(step: int) -> None:
            assert announce is not None  # no step is made again before the first
            announce(step)

        pictures = self.pipeline(request, on_step, lambda: self._interrupt, on_begin, on_repeat, tell)
        return None if pictures is None else pictures.transpose(0, 1)

    def decode_again(self, tile: int) -> Tensor | None:
        """What generate() would have returned, had memory not run out in the decoder: in tiles of `tile` latent cells.

        None where nothing is drawn that waits to be decoded.
        """
        if self.pipeline.recordings is not None:
            self.pipeline.recordings.drop()  # they keep memory that the decoder may need
        pictures = self.pipeline.decode_drawn(tile)
        return None if pictures is None else pictures.transpose(0, 1)

    def encode_prompts(self, orders: Sequence[Mapping[str, Any]]) -> None:
        """Encode now what generate() with each of these keywords will ask for, so that the text encoder works once.

        Raises UserError for what cannot be drawn, a prompt that is too long among it.
        """
        for order in orders:
            request = self._request(order)
            self.pipeline.loras.begin(request.steps)
            self.pipeline.encode(request)

    def prepare(self, attention: Sequence[str], *, records: bool) -> str:
        """Choose how to compute on `device`, which is settled; returns what was found, in words.

        attention: names of shared.ops.attention; of several the fastest is taken. records: weights stay where they will
        be put, so that forwards may be recorded (cuda_graph.py): small ones, all with ZIMAGE_GRAPHS=1 in the
        environment, none with 0.
        """
        backend, words = SDPA, ""
        if self.device.type == "cuda":
            backend = BACKENDS[attention[0]]
            if len(attention) > 1:
                config = self.transformer.config
                candidates = tuple(BACKENDS[name] for name in attention)
                found = fastest(candidates, self.device, self.transformer.dtype, config.n_heads, config.head_dim)
                backend, words = found.backend, f" ({found.words})"
        self.transformer.use_attention(backend)
        self.pipeline.decoding.stays = records
        asked = os.environ.get("ZIMAGE_GRAPHS", "").strip()
        allowed = asked != "0" and type(self.transformer) is ZImageTransformer
        records = records and allowed and self.device.type == "cuda"
        self.pipeline.recordings = None
        if records:
            self.pipeline.recordings = GraphedForwards(
                self.transformer, CudaRecorder(self.device), lambda: self.pipeline.loras.strengths,
                most_tokens=None if asked == "1" else USUAL_MOST_TOKENS,
            )  # fmt: skip
        return f"attention by {backend.name}{words}; forwards {'recorded' if records else 'launched kernel by kernel'}"

    def load_loras(self, files: Sequence[str | Path], multipliers: Sequence[Strength]) -> list[Match]:
        """Put these LoRA files, and no others, beside the linears; an empty list takes all off.

        multipliers: a number each, or phases, each a list of numbers spread over the phase's steps. Returns what of
        each file found a place. Raises UserError for a file for another model, CheckpointError for one that is broken;
        then the LoRAs stay as they were.
        """
        loras = self.pipeline.loras
        if self.pipeline.recordings is not None:
            self.pipeline.recordings.drop()
        touched = loras.touches_encoder
        matches = loras.apply([Path(file) for file in files], multipliers)
        if touched or loras.touches_encoder:
            self.pipeline.text_encoder.forget(loras.encoder_state)
        return matches

    def get_loras_transformer(self, *_: Any, **__: Any) -> tuple[list[str], list[float]]:
        """LoRAs the model itself wants besides the user's: none."""
        return [], []

    def _request(self, keywords: Mapping[str, Any]) -> GenerateRequest:
        branch = self.transformer.control
        return from_host_kwargs(
            self.model_def,
            keywords,
            None if branch is None else branch.config,
            takes_references=isinstance(self.transformer, OmniTransformer),
        )


def _pipeline_for(path: Path, transformer: ZImageTransformer, *rest: Any) -> ZImagePipeline:
    """The pipeline for a transformer that was loaded from `path`."""
    if isinstance(transformer, OmniTransformer):
        return OmniPipeline(transformer, *rest, siglip=lambda: load_siglip(*siglip_folders(path)))
    return ZImagePipeline(transformer, *rest)


def _load_text_encoder(
    path: Path, dtype: torch.dtype, place: Callable[[nn.Module], None] | None, keep_mapped: bool
) -> nn.Module:
    module = load_text_encoder(path, dtype, keep_mapped=keep_mapped)
    if place is not None:
        place(module)
    return module


def _locate(name: str | Path) -> Path:
    path = Path(name)
    if path.exists():
        return path
    found = locate_file(str(name), error_if_none=False)
    if found is None:
        raise UserError(f"{name}: there is no such file here or in the checkpoint folders.", "Check the path.")
    return Path(found)


def _first(role: str, given: str | Path | None, *candidates: str | Path) -> Path:
    """The given file, else the first candidate that exists here or in a checkpoint folder."""
    if given:
        return _locate(given)
    for candidate in candidates:
        if Path(candidate).is_file():
            return Path(candidate)
        found = None if Path(candidate).is_absolute() else locate_file(str(candidate), error_if_none=False)
        if found:
            return Path(found)
    names = ", ".join(str(c) for c in candidates)
    raise UserError(f"No {role} was given and none was found (looked for {names}).", "Name it, or put it there.")


def _tokenizer_folder(given: str | Path | None, model_def: Mapping[str, Any], encoder: Path) -> Path:
    if given:
        return Path(given)
    if (encoder.parent / "tokenizer_config.json").is_file():
        return encoder.parent
    folder = str(model_def.get("text_encoder_folder") or TEXT_ENCODER_FOLDER)
    return Path(locate_folder(folder, error_if_none=False) or encoder.parent)


def _host_lora_steps(transformer: nn.Module, schedule: Any, steps: int) -> Callable[[int], None]:
    """How a host's own LoRAs (mmgp's, scheduled per step) learn which step is next; does nothing without them."""
    host_module = "shared.utils.loras_mutipliers"
    if schedule is None or util.find_spec("mmgp") is None or util.find_spec(host_module) is None:
        return lambda _: None
    from mmgp import offload

    import_module(host_module).update_loras_slists(transformer, schedule, steps)
    return lambda step: offload.set_step_no_for_lora(transformer, step)
