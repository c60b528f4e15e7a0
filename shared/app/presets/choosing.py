"""Which file of each list of alternatives is used, by Wan2GP's rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from shared.app.presets.preset import FileWant, Preset

if TYPE_CHECKING:
    from shared.app.device import DeviceInfo

# Which alternative a preference takes, in order; tokens are looked for in the lower-cased file name.
_PREFERENCE_TOKENS = {"int8": ("int8", "fp8"), "fp8": ("fp8", "int8")}
# What can be asked for where a preset has alternatives of a file; "bf16" takes the first, the plain one.
QUANTIZATIONS = ("bf16", *_PREFERENCE_TOKENS)


@dataclass(frozen=True, slots=True, kw_only=True)
class FilePlan:
    """The files chosen for a preset, as URLs or paths. `vae` is empty if the family finds its own.

    published: bytes by role and URL, as the preset states them.
    """

    transformer: str
    modules: tuple[str, ...] = ()
    text_encoder: str = ""
    text_encoder_folder: str = ""  # below the checkpoint root, or "file:..."; the tokenizer lies there too
    vae: str = ""
    extra: tuple[FileWant, ...] = ()
    published: Mapping[tuple[str, str], int] = field(default_factory=dict)

    @property
    def wants(self) -> tuple[FileWant, ...]:
        """Every file of the plan, the transformer first."""
        parts = [FileWant(url=self.transformer, role="transformer")]
        parts += [FileWant(url=url, role="module") for url in self.modules]
        if self.text_encoder:
            folder = "" if self.text_encoder_folder.startswith("file:") else self.text_encoder_folder
            parts.append(FileWant(url=self.text_encoder, role="text_encoder", subfolder=folder))
        if self.vae:
            parts.append(FileWant(url=self.vae, role="vae"))
        return (*(replace(part, published=self.published.get((part.role, part.url))) for part in parts), *self.extra)


def choose_files(
    preset: Preset,
    preference: str = "",
    device: DeviceInfo | None = None,
    *,
    text_encoder_preference: str | None = None,
) -> FilePlan:
    """One file of each list of alternatives, by Wan2GP's rule.

    preference: "int8" or "fp8" takes such a file if there is one; else the first is taken, the plain one.
    text_encoder_preference: the same for the text encoder (None: as `preference`).
    """
    dtype = _compute_dtype(preset, device)
    vae = _pick(preset.vae_urls, preference, dtype)
    companions = list(preset.companions)
    if not vae:
        own_vae = next((want for want in companions if want.role == "vae"), None)
        vae = own_vae.url if own_vae else ""
    return FilePlan(
        transformer=_pick(preset.urls, preference, dtype),
        modules=tuple(_pick(urls, preference, dtype) for urls in preset.modules),
        text_encoder=_pick(
            preset.text_encoder_urls,
            preference if text_encoder_preference is None else text_encoder_preference,
            dtype,
        ),
        text_encoder_folder=preset.model_def.get("text_encoder_folder") or "",
        vae=vae,
        extra=(
            *(want for want in companions if want.role != "vae"),
            *(_preload_want(url) for url in preset.preload_urls),
        ),
        published=preset.published,
    )


def _pick(urls: Sequence[str], preference: str, dtype: str) -> str:
    """The alternative that fits the preference, among those the one named after `dtype`; else the first."""
    tokens = _PREFERENCE_TOKENS.get(preference, ())
    fitting = [url for token in tokens for url in urls if token in file_name(url).lower()]
    named = [url for url in fitting if dtype in file_name(url).lower()]
    return next(iter(named or fitting or urls), "")


def _compute_dtype(preset: Preset, device: DeviceInfo | None) -> str:
    """What the preset demands, else "bf16", or "fp16" on a GPU that lacks bf16 (before capability 8.0)."""
    if preset.model_def.get("dtype"):
        return str(preset.model_def["dtype"])
    old_gpu = device is not None and device.capability is not None and device.capability < 80
    return "fp16" if old_gpu else "bf16"


def file_name(url: str) -> str:
    """What a path or URL ends in."""
    return url.partition("|")[0].replace("\\", "/").rsplit("/", 1)[-1]


def _preload_want(url: str) -> FileWant:
    """Wan2GP writes "URL|folder"; "%lora_dir" there is the LoRA folder."""
    address, _, folder = url.partition("|")
    return FileWant(url=address, role="preload", subfolder="loras" if folder == "%lora_dir" else folder)
