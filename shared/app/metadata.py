"""The record of a picture: what is written into it so that it can be made again, and how it is saved and read.

The keys and the places are Wan2GP's (host 12.60), so that its "load settings from image" takes our files: PNG carries
the JSON text in an iTXt chunk with the keyword `comment`, JPEG and WebP carry it in the EXIF tag UserComment. What only
this program knows (hashes of the weights, device, number type) stands apart under `provenance`.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from shared.app.schema import SETTINGS_VERSION
from shared.quant.errors import RunError, UserError

if TYPE_CHECKING:
    from PIL import Image

    from shared.app.presets import Preset

FORMATS: Mapping[str, str] = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
"""File ending -> Pillow's name of the format; the formats that can carry a record."""

RECORD_MARK = "WanGP"
"""Wan2GP refuses a record whose `type` does not contain this word."""

_PNG_KEYWORD = "comment"
_EXIF_IFD = 0x8769  # pointer tag of the Exif sub-directory
_USER_COMMENT = 0x9286  # tag UserComment, inside the Exif sub-directory
_ASCII_CHARSET = b"ASCII\0\0\0"  # EXIF 2.3, 4.6.5: the first eight bytes of UserComment name the character code
_UNICODE_CHARSET = b"UNICODE\0"
_JPEG_SEGMENT_BYTES = 65_533  # an APP1 segment counts its length in two bytes, which count themselves
_LOSSY_QUALITY = 95  # Wan2GP's default for JPEG


def build_record(
    settings_record: Mapping[str, Any],
    preset: Preset,
    *,
    model_filename: str,
    modules: Sequence[str] = (),
    generation_seconds: float,
    created: datetime,
    provenance: Mapping[str, Any],
) -> dict[str, Any]:
    """The JSON-able record of one picture, in Wan2GP's key names.

    settings_record: `GenerationSettings.as_record()` of this very picture (its own seed, batch_size 1).
    model_filename, modules: the weights used, as base names or URLs. created: with or without a time zone.
    provenance: our own keys; kept apart under "provenance", which Wan2GP ignores.
    Settings without meaning for this picture are left out (`prune_settings`).
    """
    record: dict[str, Any] = {"type": f"{RECORD_MARK} settings - {preset.name}"}
    record |= prune_settings(settings_record, preset.settings, preset.model_def)
    record["settings_version"] = SETTINGS_VERSION
    record["model_type"] = preset.id
    if preset.architecture != preset.id:
        record["base_model_type"] = preset.architecture
    record["model_filename"] = model_filename
    if modules:
        record["modules"] = list(modules)
    record["generation_time"] = round(generation_seconds, 2)
    record["creation_date"] = created.isoformat(timespec="seconds")
    record["creation_timestamp"] = int(created.timestamp())
    record["provenance"] = dict(provenance)
    return record


def prune_settings(
    settings_record: Mapping[str, Any], defaults: Mapping[str, Any], model_def: Mapping[str, Any]
) -> dict[str, Any]:
    """Leave out the settings that have no meaning for this picture and that its preset would set the same.

    The second condition goes beyond Wan2GP's: the record together with the preset makes exactly this picture again.
    """
    guided = float(settings_record.get("guidance_scale") or 0) > 0
    nag = float(settings_record.get("NAG_scale") or 0) > 1  # scale 1 is the identity
    has_control = settings_record.get("image_guide") or settings_record.get("video_prompt_type")
    has_source = has_control or settings_record.get("image_start") or settings_record.get("image_mask")
    meaningless: set[str] = {"sample_solver", "flow_shift", "negative_prompt"}  # where they are empty
    meaningless = {key for key in meaningless if settings_record.get(key) in (None, "")}
    if not nag:
        meaningless |= {"NAG_scale", "NAG_tau", "NAG_alpha"}
    if not guided:
        meaningless |= {"cfg_normalization", "cfg_truncation"}
        if not model_def.get("guidance_max_phases"):
            meaningless |= {"guidance_scale", "guidance_phases"}
    if not has_control:
        meaningless |= {
            "control_net_weight",
            "control_net_weight2",
            "control_net_weight_alt",
            "video_prompt_type",
        }
    if not has_source:
        meaningless |= {"denoising_strength", "masking_strength", "mask_expand"}
    return {
        key: value for key, value in settings_record.items() if key not in meaningless or value != defaults.get(key)
    }


def save_image(path: Path, image: Image.Image, record: Mapping[str, Any], format: str | None = None) -> None:
    """Write the picture with its record; `path` appears whole or not at all.

    format: a Pillow name out of FORMATS; None takes it from the file ending. The bytes go to a temporary file in the
    same folder, reach the disk (fsync) and take the final name in one step; on any failure nothing is left behind.
    A record too long for a JPEG segment (64 KB) goes to `<path>.json` instead.
    Raises RunError naming the file when the disk refuses.
    """
    format = format or FORMATS[path.suffix.lower()]
    text = json.dumps(record, ensure_ascii=False)
    save_options, in_picture = _embed(format, text, record)
    if not in_picture:
        write_file(sidecar_path(path), lambda file: file.write(json.dumps(record, indent=1).encode()))
    write_file(path, lambda file: image.save(file, format=format, **save_options))


def read_record(path: Path) -> dict[str, Any] | None:
    """The record inside a picture (or of a `.json` settings file); None when it carries none.

    Raises UserError when the file cannot be read as a picture or as JSON.
    """
    if path.suffix.lower() == ".json":
        try:
            return _as_record(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: not readable ({error}).") from error

    from PIL import Image

    try:
        with Image.open(path) as image:
            text = _png_comment(image) if image.format == "PNG" else _user_comment(image)
    except (OSError, ValueError, SyntaxError) as error:  # Pillow reports a broken file as any of the three
        raise UserError(f"{path}: not a readable picture ({error}).") from error
    record = _as_record(text)
    if record is None and sidecar_path(path).is_file():
        return read_record(sidecar_path(path))
    return record


def sidecar_path(path: Path) -> Path:
    """Where the record of a picture lives that could not hold it: `picture.jpg` -> `picture.jpg.json`."""
    return path.with_name(path.name + ".json")


def write_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Create or replace `path` in one step with what `write(file)` writes; nothing partial is ever visible.

    Raises RunError naming the file when the disk refuses.
    """
    try:
        with _replacing(path) as file:
            write(file)
    except OSError as error:
        reason = error.strerror or str(error)
        raise RunError(
            f"{path} could not be written: {reason}.", "Look at the free space and the permissions there."
        ) from error


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    temporary = path.with_name(f".{path.name[:80]}.{secrets.token_hex(4)}.part")  # same folder: os.replace stays atomic
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with suppress(OSError):  # gone already after the replace
            temporary.unlink()


def _embed(format: str, text: str, record: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """Pillow's save options that carry the record, and whether they do carry it."""
    from PIL import Image, PngImagePlugin

    if format == "PNG":
        chunks = PngImagePlugin.PngInfo()
        chunks.add_itxt(_PNG_KEYWORD, text)
        return {"pnginfo": chunks}, True
    exif = Image.Exif()
    # JSON escapes make the text plain ASCII, the one character code that every reader of UserComment agrees on.
    exif.get_ifd(_EXIF_IFD)[_USER_COMMENT] = _ASCII_CHARSET + json.dumps(record, ensure_ascii=True).encode("ascii")
    exif_bytes = exif.tobytes()
    options: dict[str, Any] = {"quality": _LOSSY_QUALITY}
    if format == "JPEG":
        options["subsampling"] = 0  # full colour resolution: saturated edges stay clean
        if len(exif_bytes) > _JPEG_SEGMENT_BYTES:
            return options, False
    return options | {"exif": exif_bytes}, True


def _png_comment(image: Image.Image) -> str | None:
    image.load()  # text chunks may stand behind the pixels
    text = getattr(image, "text", {}).get(_PNG_KEYWORD)
    return None if text is None else str(text)


def _user_comment(image: Image.Image) -> str | None:
    value = image.getexif().get_ifd(_EXIF_IFD).get(_USER_COMMENT)
    if isinstance(value, str):
        return value
    if not isinstance(value, bytes):
        return None
    if value.startswith(_UNICODE_CHARSET):
        return value[len(_UNICODE_CHARSET) :].decode("utf-16-le", errors="replace")
    return value.removeprefix(_ASCII_CHARSET).decode("utf-8", errors="replace")


def _as_record(text: str | None) -> dict[str, Any] | None:
    try:
        value = json.loads(text) if text else None
    except (ValueError, RecursionError):  # another program's free text, of nothing but brackets at the worst
        return None
    return value if isinstance(value, dict) else None
