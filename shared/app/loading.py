"""ModelHolder: keeps one model in memory, loads another in its place when a plan asks for one."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.app.device import attention_candidates
from shared.app.loras import Strength
from shared.app.parts import TOKENIZER, WORDS, file_identities, part_keys
from shared.app.plan import VAE_DTYPE, GenerationPlan, requested_profile
from shared.app.prompt_cache import EncoderPrompts
from shared.quant.checkpoint import Checkpoint
from shared.quant.kernels import REFERENCE
from shared.quant.mapping import forget

if TYPE_CHECKING:
    from torch import nn

    from shared.app.context import AppContext
    from shared.app.offload import Offloader
    from shared.quant.kernels.resolve import Resolved

logger = logging.getLogger(__name__)

DIRECT = "direct"  # the offloader that leaves weights where they are

# Roles of the files that a model is loaded from.
WEIGHTS = ("transformer", "module", "text_encoder", "vae")


@dataclass(slots=True, kw_only=True)
class LoadedModel:
    """What a handler loaded, where it was placed, and which LoRA files are on it.

    key: what it was loaded from and for; part_keys: the same of each part. processor: the pipeline object of contract
    C1c.
    loras: (file, strength) in order; None while they are being changed. lora_matches: what the family says of each,
    JSON-able by as_dict() as for `match_words`. kernels: what multiplies its packed layers.
    modules: by name, as the handler gave them; the text encoder joins them when it is needed. prompts: those that this
    text encoder is known to have encoded. text_seconds: what it took to encode the prompts of the last ensure().
    """

    key: tuple[Any, ...]
    part_keys: dict[str, Hashable]
    processor: Any
    offloader: Offloader
    modules: dict[str, nn.Module]
    prompts: EncoderPrompts | None = None
    is_placed: bool = False
    text_seconds: float = 0.0
    loras: tuple[tuple[Path, Strength], ...] | None = ()
    lora_matches: Sequence[Any] = ()
    kernels: tuple[Resolved, ...] = ()

    def has(self, part: str, keys: Mapping[str, Hashable]) -> bool:
        """Whether its part of this name is the one that these keys ask for."""
        return part in keys and self.part_keys.get(part) == keys[part]

    def place(self) -> None:
        """Put the modules where they compute, if they are not there yet."""
        if not self.is_placed:
            self.offloader.place(self.modules)
            self.processor.device = self.offloader.device
            self.is_placed = True


class ModelHolder:
    """Holds at most one model. Not for several threads at once, except `interrupt`."""

    def __init__(self, ctx: AppContext) -> None:
        self._ctx = ctx
        self._model: LoadedModel | None = None

    def ensure(
        self,
        plan: GenerationPlan,
        say: Callable[[str], None],
        orders: Sequence[Mapping[str, Any]] | None = None,
    ) -> LoadedModel:
        """The model of the plan with its LoRAs, all of whose files are on this machine.

        The one in memory if it is the same, else that one is released first, but for the parts that both have in
        common, and the rest of the plan's is loaded. say: what is going on, in words.
        orders: the keywords of every generate() to come, whose prompts are encoded first; where each of them is
        remembered, the text encoder is not loaded at all. None loads everything.
        Raises CheckpointError for a file that cannot be used, UserError for a LoRA that does not fit the model and for
        an order that cannot be drawn.
        """
        key = self._key(plan)
        if self._model is None or self._model.key != key:
            kept = self._take_common_parts(plan)
            words = [WORDS[name] for name in kept if name in WORDS]
            say(f"Loading {plan.preset.name}" + (f"; kept in memory: {', '.join(words)}" if words else ""))
            self._model = self._load(plan, key, kept, defers_text_encoder=orders is not None)
            del kept
        model = self._model
        self._apply_loras(model, plan, say)
        encode_prompts = getattr(model.processor, "encode_prompts", None)  # what a Wan2GP family lacks
        if orders is not None and encode_prompts is not None:
            began = time.perf_counter()
            encode_prompts(orders)
            model.text_seconds = time.perf_counter() - began
            if encoder := model.modules.get("text_encoder"):
                # It has done its work. On a CPU its weights are mapped, and leave 7 GB of RAM to the transformer.
                forget((*encoder.parameters(), *encoder.buffers()))
            if "text_encoder" not in model.modules:
                say("The text encoder was not loaded: every prompt is remembered")
        model.place()
        return model

    @property
    def is_loaded(self) -> bool:
        """Whether a model is in memory."""
        return self._model is not None

    def interrupt(self) -> None:
        """Make a running `generate` stop within one step; from any thread."""
        if (model := self._model) is not None:
            model.processor._interrupt = True

    def stands_for(self, plan: GenerationPlan) -> None:
        """The model in memory has become what this plan asks for: it need not be loaded again."""
        if self._model is not None:
            self._model.key, self._model.part_keys = self._key(plan), self._part_keys(plan)

    def release(self) -> None:
        """Let go of the model and the memory it holds."""
        if self._model is None:
            return
        # The weights go first: what nobody uses any more need not travel back from the GPU.
        offloader, self._model = self._model.offloader, None
        offloader.release()

    def _key(self, plan: GenerationPlan) -> tuple[Any, ...]:
        others = tuple(file.path for file in plan.files if file.role not in ("lora", "preload", "annotator"))
        weights = file_identities(path for role in WEIGHTS for path in plan.paths(role))
        choices = (plan.attention.value, plan.compute.value, plan.safer, plan.offload.value)
        return (plan.preset.id, others, weights, plan.machine, *choices)

    def _part_keys(self, plan: GenerationPlan) -> dict[str, Hashable]:
        # By its place in memory: a handler is an object that lives as long as the program, and may not be hashable.
        family = id(self._ctx.families.handler(plan.preset.architecture))
        return part_keys(plan, family, self._tokenizer_folder(plan))

    def _take_common_parts(self, plan: GenerationPlan) -> dict[str, Any]:
        """Release the model in memory; returns those of its parts that the plan has too, by name, without LoRAs."""
        model = self._model
        kept: dict[str, Any] = {}
        if model is not None and model.loras is not None:  # else LoRAs may be half on
            if model.loras:
                model.processor.load_loras([], [])
            wanted = self._part_keys(plan)
            held = {**model.modules, TOKENIZER: getattr(model.processor, "tokenizer", None)}
            kept = {name: part for name, part in held.items() if part is not None and model.has(name, wanted)}
            del held
        del model
        self.release()
        return kept

    def _load(
        self, plan: GenerationPlan, key: tuple[Any, ...], kept: Mapping[str, Any], *, defers_text_encoder: bool
    ) -> LoadedModel:
        import torch

        from shared.app.offload import make_offloader

        prompts = self._prompts_of(plan)
        profile = requested_profile(self._ctx)
        handler = self._ctx.families.handler(plan.preset.architecture)
        processor, modules = handler.load_model(
            [str(path) for path in (*plan.paths("transformer"), *plan.paths("module"))],
            plan.preset.id,
            plan.preset.architecture,
            dict(plan.preset.model_def),
            dtype=getattr(torch, plan.machine.dtype.value),
            VAE_dtype=getattr(torch, VAE_DTYPE),
            profile=-1 if profile is None else profile,
            text_encoder_filename=_first(plan.paths("text_encoder")),
            vae_filename=_first(plan.paths("vae")),
            tokenizer_folder=self._tokenizer_folder(plan),
            place_text_encoder=partial(self._add_text_encoder, plan) if defers_text_encoder else None,
            prompt_store=prompts,
            safer=plan.safer,
            parts=kept,
            keep_mapped=plan.machine.device.kind == "cpu",
            keep_apart=_is_moved_by_us(plan),
        )
        kernels = self._resolve(plan, modules)
        offloader = make_offloader(plan.machine.device, plan.placement, profile)
        processor.device = offloader.device
        self._prepare(plan, processor, offloader)
        logger.info("%s: %s, because %s", plan.preset.id, offloader.describe(), plan.offload.reason)
        return LoadedModel(
            key=key,
            part_keys=self._part_keys(plan),
            processor=processor,
            offloader=offloader,
            modules=dict(modules),
            prompts=prompts,
            kernels=kernels,
        )

    def _prepare(self, plan: GenerationPlan, processor: Any, offloader: Offloader) -> None:
        """Let the model choose how to compute on its device, now that this is known."""
        prepare = getattr(processor, "prepare", None)  # what a Wan2GP family lacks
        if prepare is None:
            return
        asked = plan.attention.value
        attention = attention_candidates(plan.machine.device) if asked == "auto" else (asked,)
        found = prepare(attention, records=offloader.name == DIRECT)
        logger.info("%s: %s", plan.preset.id, found)

    def _add_text_encoder(self, plan: GenerationPlan, module: nn.Module) -> None:
        """Put the text encoder, which is needed now, where the other modules are or are to be."""
        model = self._model
        assert model is not None  # only a loaded model meets a prompt
        model.kernels += self._resolve(plan, {"text_encoder": module})
        if model.is_placed:
            model.offloader.release()
            model.is_placed = False
        model.modules["text_encoder"] = module
        model.place()

    def _resolve(self, plan: GenerationPlan, modules: Mapping[str, nn.Module]) -> tuple[Resolved, ...]:
        """Choose the kernels of packed layers. Before they are placed: an offloader pins them as they lie then."""
        import torch

        from shared.quant.kernels.resolve import resolve

        device, compute = torch.device(plan.machine.device.kind), plan.compute.value
        if compute == _reading_compute(plan):
            kernels = resolve(list(modules.values()), device, compute)
        else:
            reading = [module for name, module in modules.items() if name == "text_encoder"]
            drawing = [module for name, module in modules.items() if name != "text_encoder"]
            kernels = resolve(drawing, device, compute) + resolve(reading, device, _reading_compute(plan))
        for kernel in kernels:
            logger.info("%s: %s", plan.preset.id, kernel)
        return kernels

    def _prompts_of(self, plan: GenerationPlan) -> EncoderPrompts | None:
        """The cache of prompts for the plan's text encoder; None when it is off."""
        cache = self._ctx.prompt_cache()
        encoders = plan.paths("text_encoder")
        if cache is None or not encoders:
            return None
        files = Checkpoint.open(encoders[0]).files
        computed = f"{plan.machine.dtype.value} {_reading_compute(plan)} {plan.machine.device.kind}"

        def identity() -> str | None:
            hashes = [self._ctx.files.known_sha256(file) for file in files]
            return None if None in hashes else f"{hashes} {computed}"

        return EncoderPrompts(cache, identity)

    def _apply_loras(self, model: LoadedModel, plan: GenerationPlan, say: Callable[[str], None]) -> None:
        wanted = tuple(zip(plan.paths("lora"), plan.lora_strengths, strict=True))
        if model.loras == wanted:
            return
        model.loras = None
        if wanted:
            say("Loading the LoRA" if len(wanted) == 1 else f"Loading {len(wanted)} LoRAs")
        files, strengths = [file for file, _ in wanted], [strength for _, strength in wanted]
        model.lora_matches = tuple(model.processor.load_loras(files, strengths))
        model.loras = wanted

    def _tokenizer_folder(self, plan: GenerationPlan) -> str | None:
        """Where the tokenizer is; None leaves it to the family, which looks beside the text encoder."""
        for path in plan.paths("companion"):
            if path.name == "tokenizer_config.json":
                return str(path.parent)
        folder = str(plan.preset.model_def.get("text_encoder_folder") or "")
        found = self._ctx.files.find(folder) if folder.startswith("file:") else None
        return None if found is None else str(found)


def _is_moved_by_us(plan: GenerationPlan) -> bool:
    """Whether an offloader of ours brings the weights to a GPU, which lays a block's tensors one behind the other."""
    is_ours = plan.placement is not None and plan.placement.engine in ("direct", "stream")
    return is_ours and plan.machine.device.kind == "cuda"


def _reading_compute(plan: GenerationPlan) -> str:
    """How a packed text encoder multiplies: unless something is asked for, without rounding activations.

    Language models have a few activations a thousand times as large as the others (Sun et al. 2024, arXiv 2402.17762),
    beside which 8 bits leave little of the rest; and a prompt is read once for all steps.
    """
    return REFERENCE if plan.compute.value == "auto" else str(plan.compute.value)


def _first(paths: Sequence[Path]) -> str | None:
    return str(paths[0]) if paths else None
