"""Prompt to caption features: Qwen3's hidden states after its second-to-last layer, for the prompt's own tokens only.

The transformer was trained on `hidden_states[-2]`, so the encoder's last layer and its final norm are never used: they
are neither loaded nor run. Neither is the padding to 512 tokens that other pipelines compute and throw away; attention
is causal, so padding on the right changes nothing (difference 9e-9 on a toy model).
Source: diffusers 0.42.1 pipelines/z_image/pipeline_z_image.py, _encode_prompt.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor, nn

from models.z_image.config import AXES_LENS, SEQUENCE_MULTIPLE
from models.z_image.gguf_names import with_hugging_face_names
from shared.quant.assemble import MAPPED_FROM, Storage, fill
from shared.quant.checkpoint import Checkpoint
from shared.quant.errors import LayerMismatchError, UserError
from shared.quant.formats import layers_of
from shared.quant.layer_plan import Part, Plan, shapes
from shared.quant.number_checks import NumberChecks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Qwen3's chat template with thinking enabled and no system message, rendered.
TEMPLATE = "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"

# Caption and image share the first rotary axis: 1536 positions, of which the image takes one.
MAX_TOKENS = AXES_LENS[0] - SEQUENCE_MULTIPLE

# What the reference pipelines give the encoder at most, cutting the rest off: the length the model was trained with.
TRAINED_TOKENS = 512

# Qwen3 constants that no tensor shows: Qwen/Qwen3-4B config.json.
ROPE_THETA = 1_000_000.0
NORM_EPS = 1e-6

LongPrompt = Literal["keep", "cut", "refuse"]

# An embedding is about 2560 numbers a token, so this many prompts of 100 tokens take some 130 MB.
CACHE_SIZE = 128


class FeatureStore(Protocol):
    """What remembers features for longer than this process; a host's, for one encoder."""

    def load(self, key: str) -> Tensor | None:
        """The features (tokens, width) kept under the key, on the CPU; None when there are none."""

    def save(self, key: str, features: Tensor) -> None:
        """Keep features (on the CPU) under the key."""


class TextEncoder:
    """Tokenizer and encoder together, with a memory of the last prompts (features are kept on the CPU).

    model: the encoder, or what loads it; then that happens when first a prompt is met that nothing remembers.
    """

    def __init__(
        self,
        model: nn.Module | Callable[[], nn.Module],
        tokenizer: PreTrainedTokenizerBase,
        store: FeatureStore | None = None,
    ) -> None:
        self._model = model
        self.tokenizer = tokenizer
        self._store = store
        self._state = ""
        self._cache: OrderedDict[tuple[int, ...], Tensor] = OrderedDict()  # by token ids
        self.encoded = 0  # prompts that were really run, for tests and reports

    @property
    def model(self) -> nn.Module:
        """The encoder, loaded now if it is not yet."""
        if not isinstance(self._model, nn.Module):
            self._model = self._model()
        return self._model

    @property
    def loaded(self) -> nn.Module | None:
        """The encoder if it is loaded."""
        return self._model if isinstance(self._model, nn.Module) else None

    def encode(
        self,
        prompts: Sequence[str],
        device: torch.device,
        *,
        long_prompt: LongPrompt = "keep",
        tell: Callable[[str], None] = lambda note: None,
        template: str = TEMPLATE,
    ) -> list[Tensor]:
        """Features of each prompt, (tokens, width) in the encoder's type on `device`.

        long_prompt: what becomes of a prompt of more than 512 tokens, the template's eight among them: "keep" takes it
        whole, "cut" its first 512 as the reference pipelines do, which `tell` is told, "refuse" raises UserError.
        More than 1504 raise UserError in any case but "cut": the transformer has positions for no more.
        template: what each is put into, at "{prompt}".
        """
        return [self._features(self._fitted(p, template, long_prompt, tell), device).to(device) for p in prompts]

    def _fitted(
        self, prompt: str, template: str, long_prompt: LongPrompt, tell: Callable[[str], None]
    ) -> tuple[int, ...]:
        """The token ids of the prompt in its template, as many as are taken."""
        ids: list[int] = self.tokenizer(template.format(prompt=prompt), add_special_tokens=False)["input_ids"]
        begins = f"The prompt {prompt[:30]!r}... has {len(ids)} tokens"
        if long_prompt == "cut" and len(ids) > TRAINED_TOKENS:
            lost = self.tokenizer.decode(ids[TRAINED_TOKENS:], skip_special_tokens=True).removesuffix("\nassistant\n")
            tell(f"{begins} and was cut to {TRAINED_TOKENS}, before {lost[:60]!r}.")
            return tuple(ids[:TRAINED_TOKENS])
        limit = TRAINED_TOKENS if long_prompt == "refuse" else MAX_TOKENS
        if len(ids) > limit:
            raise UserError(f"{begins}; at most {limit} are taken.", "Shorten it, or --set long_prompt=cut.")
        return tuple(ids)

    def forget(self, state: str | None = None) -> None:
        """Encode every prompt anew. state: tells the encoder's weights, changed by LoRA files, from all others; "" are
        its own, None those it had."""
        self._cache.clear()
        self._state = self._state if state is None else state

    def _features(self, ids: tuple[int, ...], device: torch.device) -> Tensor:
        if ids in self._cache:
            self._cache.move_to_end(ids)
            return self._cache[ids]
        # By ids, which hold the template, what was cut off, and the tokenizer's doing.
        key = hashlib.sha256(f"{self._state} {ids}".encode()).hexdigest()
        features = None if self._store is None else self._store.load(key)
        if features is None or len(features) != len(ids):
            model = self.model
            checks = getattr(model, "number_checks", None)
            with torch.no_grad(), nullcontext() if checks is None else checks.beside():
                output = model(input_ids=torch.tensor([list(ids)], device=device), use_cache=False)
            features = output.last_hidden_state[0].cpu()
            self.encoded += 1
            if not bool(torch.isfinite(features).all()) or bool(features.min() == features.max()):
                return features  # bad numbers are for the caller to see, not to be remembered
            if self._store is not None:
                self._store.save(key, features)
        self._cache[ids] = features
        if len(self._cache) > CACHE_SIZE:
            self._cache.popitem(last=False)
        return features


def load_text_encoder(
    path: str | Path, dtype: torch.dtype, *, compute: str = "auto", keep_mapped: bool = False
) -> nn.Module:
    """Build Qwen3 without its last layer and final norm from a checkpoint's own sizes, in `dtype` on the CPU.

    Reads Hugging Face names at any prefix (`model.`, `text_encoders.qwen3_4b.transformer.model.`) and llama.cpp's in
    GGUF files. Its output's last_hidden_state is the whole model's hidden_states[-2]. compute: how packed layers are
    multiplied. keep_mapped: for a model that stays on the CPU, see Storage's widen. Raises LayerMismatchError or
    UnknownFormatError.
    """
    from accelerate import init_empty_weights
    from transformers import Qwen3Config, Qwen3Model
    from transformers.initialization import no_init_weights

    checkpoint = with_hugging_face_names(Checkpoint.open(path))
    plan = _plan(checkpoint)
    config = Qwen3Config(
        **_sizes(checkpoint, plan),
        rms_norm_eps=NORM_EPS,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        use_cache=False,
        attn_implementation="sdpa",
        dtype=dtype,
    )
    unused = (f"layers.{config.num_hidden_layers}.", "norm")
    with no_init_weights(), init_empty_weights(include_buffers=False):
        model = Qwen3Model(config)
    model.norm = nn.Identity()
    used = {module: parts for module, parts in plan.items() if not module.startswith(unused)}
    is_large = checkpoint.nbytes >= MAPPED_FROM
    checks = NumberChecks()
    storage = Storage(
        dtype=dtype,
        compute=compute,
        widen=keep_mapped and is_large,
        cast_later=is_large,
        checks=checks if is_large else None,
    )
    fill(model, used, storage, source=str(checkpoint.path))
    model.number_checks = checks  # beside the first prompt, see TextEncoder
    return model.eval()


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer files of a folder, never from a network. Raises UserError when they are not there."""
    from transformers import AutoTokenizer

    present = {path.name for path in Path(folder).glob("*")}
    if "tokenizer_config.json" not in present or not (
        {"tokenizer.json"} <= present or {"vocab.json", "merges.txt"} <= present
    ):
        raise UserError(
            f"No tokenizer in {folder}: it needs tokenizer_config.json and tokenizer.json.",
            "They come with the text encoder; Z-Image uses Qwen3's.",
        )
    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)


def _plan(checkpoint: Checkpoint) -> Plan:
    """The encoder's layers by name without prefix; what else is in the file (a language head, a VAE) is left alone."""
    landmark = "embed_tokens."
    prefix = next((n.split(landmark)[0] for n in checkpoint.tensors if f".{landmark}" in f".{n}"), None)
    if prefix is None:
        raise LayerMismatchError(
            f"{checkpoint.path}: no Qwen3 text encoder in this file ({landmark}weight is missing).",
            "`wgp.py inspect FILE` says what it looks like.",
        )
    own = tuple(prefix + part for part in (landmark, "layers.", "norm."))
    layers = layers_of(checkpoint, [n for n in checkpoint.tensors if n.startswith(own)])
    return {module[len(prefix) :]: [Part(layer)] for module, layer in layers.items()}


def _sizes(checkpoint: Checkpoint, plan: Plan) -> dict[str, Any]:
    """Qwen3Config's sizes, one layer fewer than the file has."""
    found = shapes(plan)
    try:
        vocabulary, hidden = found["embed_tokens.weight"]
        head = found["layers.0.self_attn.q_norm.weight"][0]
        layers = 1 + max(int(n.split(".")[1]) for n in plan if n.startswith("layers."))
        sizes = {
            "vocab_size": vocabulary,
            "hidden_size": hidden,
            "intermediate_size": found["layers.0.mlp.gate_proj.weight"][0],
            "num_hidden_layers": layers - 1,
            "num_attention_heads": found["layers.0.self_attn.q_proj.weight"][0] // head,
            "num_key_value_heads": found["layers.0.self_attn.k_proj.weight"][0] // head,
            "head_dim": head,
        }
        odd = head % 2  # rotary embedding turns pairs
        if min(sizes.values()) < 1 or odd or sizes["num_attention_heads"] % sizes["num_key_value_heads"]:
            raise ValueError(f"one of its sizes ({sizes})")
        return sizes
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        raise LayerMismatchError(
            f"{checkpoint.path}: not a Qwen3 text encoder, {error} is missing or of another shape.",
            "`wgp.py inspect FILE` says what it looks like.",
        ) from error
