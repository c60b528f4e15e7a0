"""What the parts of a loaded model depend on, so that a switch of presets loads only what differs.

A preset's transformer, text encoder, VAE and tokenizer are the same as another's when they come from the same files, by
the same family, in the same number type. Files are told by place, size and time of change: one that was downloaded
again or replaced since counts as another.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from pathlib import Path

from shared.app.plan import VAE_DTYPE, GenerationPlan
from shared.quant.checkpoint import Checkpoint

# What parts are called in words, in the order in which they are listed.
WORDS = {"transformer": "the transformer", "text_encoder": "the text encoder", "vae": "the VAE"}
TOKENIZER = "tokenizer"


def part_keys(plan: GenerationPlan, family: Hashable, tokenizer: str | None) -> dict[str, Hashable]:
    """Part -> everything it depends on; parts with the same key can stand in for each other.

    family: the handler that loads them. tokenizer: its folder, None where the family looks for it beside the text
    encoder. A part whose files the plan leaves to the family has no key: it is always loaded.
    """
    device = plan.machine.device
    computed = (plan.machine.dtype.value, plan.compute.value, device.kind, device.name, plan.safer)
    encoder = file_identities(plan.paths("text_encoder"))
    networks = file_identities((*plan.paths("transformer"), *plan.paths("module")))
    vae = file_identities(plan.paths("vae"))
    return {
        "transformer": (family, plan.preset.architecture, networks, *computed),
        **({"text_encoder": (family, encoder, *computed), TOKENIZER: (family, tokenizer, encoder)} if encoder else {}),
        **({"vae": (family, vae, VAE_DTYPE, *computed)} if vae else {}),
    }


def file_identities(paths: Iterable[Path]) -> tuple[tuple[str, int, int], ...]:
    """(place, bytes, nanosecond of change) of each file, shards one by one. Raises CheckpointError as open() does."""
    found = []
    for file in (file for path in paths for file in Checkpoint.open(path).files):
        status = file.stat()
        found.append((str(file.resolve()), status.st_size, status.st_mtime_ns))
    return tuple(found)
