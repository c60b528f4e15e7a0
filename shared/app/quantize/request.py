"""What is asked of `quantize`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

DIFFUSERS_FILE = "diffusion_pytorch_model.safetensors"
CONTROL = "control"


@dataclass(frozen=True, kw_only=True)
class QuantizeRequest:
    """What the command line asks for. recipe: a name or a file. keep: patterns of layers that stay as they are.

    rank: None for the default. like: id of the preset whose settings the new one takes, "" to find it by the file.
    merge_loras: files and strengths, added to the weights first. error_lora_rank: of the error-correction LoRA that is
    written beside the output; 0 for none. calibrate: pictures that are drawn first, to see what layers are fed with.
    prompts: for them; none for the family's own. learned_rounding: see shared/quant/rounding.py. target_size: bytes of
    the new file, for recipes that say "auto"; 0 for none. shard_size: bytes of a file, 0 for one file of any size.
    diffusers: the output is a folder as diffusers has it. text_encoder, vae: files that go into the output too.
    """

    source: Path
    output: Path
    recipe: str
    rank: int | None = None
    keep: Sequence[str] = ()
    like: str = ""
    with_preset: bool = True
    overwrite: bool = False
    merge_loras: Sequence[tuple[Path, float]] = ()
    error_lora_rank: int = 0
    calibrate: int = 0
    prompts: Sequence[str] = ()
    learned_rounding: bool = False
    target_size: int = 0
    shard_size: int = 0
    diffusers: bool = False
    text_encoder: Path | None = None
    vae: Path | None = None

    @property
    def file(self) -> Path:
        """The weights file that is written; with shards, what their names begin with."""
        return self.output / DIFFUSERS_FILE if self.diffusers else self.output

    @property
    def is_gguf(self) -> bool:
        return self.file.suffix.lower() == ".gguf"
