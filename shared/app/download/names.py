"""What names and addresses tell of a file, and whether there is one at a path."""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from shared.app.hub import (
    HubFile,
)
from shared.quant.errors import UserError

# Names that say nothing about the model: they count only inside a folder that names their repository.
GENERIC_STEM = re.compile(
    r"(model|pytorch_model|diffusion_pytorch_model|adapter_model|pytorch_lora_weights|lora|transformer|vae"
    r"|text_encoder|(model_)?index|config|generation_config|preprocessor_config|scheduler_config"
    r"|tokenizer|tokenizer_config|special_tokens_map|added_tokens|chat_template|vocab|merges|README)"
    r"([-_.](fp16|bf16|fp32))?(-\d{5}-of-\d{5})?(\.safetensors\.index)?",
    re.IGNORECASE,
)


def is_generic(name: str) -> bool:
    """Whether a file's name says nothing about the model."""
    return GENERIC_STEM.fullmatch(name.rpartition(".")[0] or name) is not None


def is_url(address: str) -> bool:
    """Whether an address is one on the network."""
    return address.startswith(("https://", "http://"))


def name_in(url: str) -> str:
    """The file's name at the end of an address."""
    try:
        return PurePosixPath(urlsplit(url).path).name
    except ValueError:  # no address at all: "https://[..."
        return PurePosixPath(url).name


def repository_place(file: HubFile) -> Path:
    """Where below a root a file lies whose name says nothing: under its repository's name."""
    return Path(file.repo_id.split("/")[1], file.path)


def checked(subfolder: str) -> Path:
    """The subfolder as a path. Raises UserError for one that would leave the checkpoint folder."""
    path = Path(subfolder)
    if path.anchor or ".." in path.parts:
        raise UserError(f'"{subfolder}" is not a folder below the checkpoint folder.', "Use a relative name.")
    return path


def existing(path: Path) -> Path | None:
    """The path if there is something."""
    return path if os.path.exists(path) else None  # Path.exists raises where a name is too long


def whole_file(path: Path) -> Path | None:
    """The path if it is a file with content (links into nowhere and empty leftovers are not)."""
    return path if os.path.isfile(path) and path.stat().st_size > 0 else None


def common_end(path: Path, like: str) -> int:
    """How many last path components two paths share."""
    count = 0
    for ours, theirs in zip(reversed(path.parts), reversed(PurePosixPath(like).parts), strict=False):
        if ours.lower() != theirs.lower():
            break
        count += 1
    return count
