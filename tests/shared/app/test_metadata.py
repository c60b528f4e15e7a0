"""Records survive in pictures as Wan2GP writes and reads them, and files appear whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import stat
import struct
import sys
import zlib
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from shared.app.metadata import build_record, prune_settings, read_record, save_image, sidecar_path, write_file
from shared.quant.errors import RunError, UserError

PICTURE = Image.new("RGB", (8, 8), (200, 30, 30))
RECORD = {"type": "WanGP settings - Demo", "prompt": 'Füchse 狐 🦊 "quoted"\nline', "seed": 2**40, "flow_shift": 3.5}

DEFAULTS = {
    "prompt": "",
    "negative_prompt": "",
    "guidance_scale": 0,
    "NAG_scale": 1.0,
    "NAG_tau": 3.5,
    "NAG_alpha": 0.5,
    "control_net_weight": 1.0,
    "denoising_strength": 1.0,
    "sample_solver": "",
}


def png_chunks(path: Path) -> list[tuple[bytes, bytes]]:
    """(type, data) of every chunk, read by the PNG specification and not by Pillow."""
    data, position, chunks = path.read_bytes(), 8, []
    while position < len(data):
        (length,) = struct.unpack(">I", data[position : position + 4])
        kind, body = data[position + 4 : position + 8], data[position + 8 : position + 8 + length]
        assert struct.unpack(">I", data[position + 8 + length : position + 12 + length])[0] == zlib.crc32(kind + body)
        chunks.append((kind, body))
        position += 12 + length
    return chunks


def made_record(preset_id: str = "z_image_demo", **changes: Any) -> dict[str, Any]:
    preset: Any = SimpleNamespace(id=preset_id, name="Demo", architecture="z_image", settings=DEFAULTS, model_def={})
    facts: dict[str, Any] = {
        "settings_record": {**DEFAULTS, "prompt": "a fox", "seed": 7, "resolution": "256x256", "batch_size": 1},
        "model_filename": "transformer.safetensors",
        "generation_seconds": 1.23456,
        "created": datetime(2026, 11, 21, 9, 30, 5, tzinfo=UTC),
        "provenance": {"dtype": "float32"},
    } | changes
    return build_record(facts.pop("settings_record"), preset, **facts)


# ---------------------------------------------------------------------------------------- containers


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".JPEG", ".webp"])
def test_a_record_comes_back_from_every_format(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"picture{suffix}"

    save_image(path, PICTURE, RECORD)

    assert read_record(path) == RECORD
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_png_carries_it_in_an_itxt_chunk_named_comment_before_the_pixels(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png", PICTURE, RECORD)

    kinds = [kind for kind, _ in png_chunks(tmp_path / "a.png")]
    (text,) = [body for kind, body in png_chunks(tmp_path / "a.png") if kind == b"iTXt"]
    keyword, rest = text.split(b"\0", 1)
    assert keyword == b"comment"
    assert rest[:2] == b"\0\0"  # not compressed
    assert json.loads(rest[2:].split(b"\0", 2)[2].decode("utf-8")) == RECORD
    assert kinds.index(b"iTXt") < kinds.index(b"IDAT")


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_user_comment_is_ascii_with_its_character_code(tmp_path: Path, suffix: str) -> None:
    save_image(tmp_path / f"a{suffix}", PICTURE, RECORD)

    with Image.open(tmp_path / f"a{suffix}") as image:
        value = image.getexif().get_ifd(0x8769)[0x9286]
    assert value.startswith(b"ASCII\0\0\0")
    assert json.loads(value[8:].decode("ascii")) == RECORD


def test_user_comment_in_utf16_as_wan2gp_writes_it_is_read(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + json.dumps(RECORD, ensure_ascii=False).encode("utf-16-le")
    PICTURE.save(tmp_path / "theirs.jpg", exif=exif.tobytes())

    assert read_record(tmp_path / "theirs.jpg") == RECORD


def test_a_record_too_long_for_jpeg_goes_beside_it(tmp_path: Path) -> None:
    long = RECORD | {"prompt": "狐" * 20_000}
    path = tmp_path / "a.jpg"

    save_image(path, PICTURE, long)

    assert sidecar_path(path).is_file()
    assert read_record(path) == long


def test_a_settings_file_is_read_like_a_picture(tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text(json.dumps(RECORD), encoding="utf-8")

    assert read_record(tmp_path / "settings.json") == RECORD


@pytest.mark.parametrize("comment", [None, "made with love", "[1, 2]", pytest.param("[" * 100_000, id="brackets")])
def test_a_picture_of_another_program_has_no_record(tmp_path: Path, comment: str | None) -> None:
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    if comment is not None:
        chunks.add_text("comment", comment)
    PICTURE.save(tmp_path / "theirs.png", pnginfo=chunks)

    assert read_record(tmp_path / "theirs.png") is None


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n" + bytes(20)])
def test_a_file_that_is_no_picture_is_an_error_that_names_it(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "broken.png").write_bytes(content)

    with pytest.raises(UserError, match=r"broken\.png"):
        read_record(tmp_path / "broken.png")


def test_a_truncated_picture_is_an_error_that_names_it(tmp_path: Path) -> None:
    Image.effect_noise((64, 64), 50).convert("RGB").save(tmp_path / "cut.png")
    whole = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])

    with pytest.raises(UserError, match=r"cut\.png"):
        read_record(tmp_path / "cut.png")


# ---------------------------------------------------------------------------------------- the record


def test_the_record_has_what_wan2gp_asks_for() -> None:
    record = made_record()

    assert "WanGP" in record["type"]
    assert record["settings_version"] == 2.74
    assert (record["model_type"], record["base_model_type"]) == ("z_image_demo", "z_image")
    assert record["model_filename"] == "transformer.safetensors"
    assert record["generation_time"] == 1.23
    assert record["creation_date"] == "2026-11-21T09:30:05+00:00"
    assert record["creation_timestamp"] == 1795253405
    assert record["provenance"] == {"dtype": "float32"}


def test_base_model_type_is_left_out_when_it_says_the_same() -> None:
    assert "base_model_type" not in made_record(preset_id="z_image")


def test_settings_without_meaning_are_left_out() -> None:
    record = made_record()

    assert not {"NAG_scale", "NAG_tau", "guidance_scale", "control_net_weight", "denoising_strength"} & set(record)
    assert record["prompt"] == "a fox"


def test_nag_and_guidance_stay_when_they_are_at_work() -> None:
    given = DEFAULTS | {"NAG_scale": 4.0, "guidance_scale": 3.0}

    kept = prune_settings(given, DEFAULTS, {})

    assert (kept["NAG_scale"], kept["NAG_tau"], kept["guidance_scale"]) == (4.0, 3.5, 3.0)


def test_a_guided_model_keeps_its_guidance_even_when_off() -> None:
    assert prune_settings(DEFAULTS, DEFAULTS, {"guidance_max_phases": 1})["guidance_scale"] == 0


@pytest.mark.parametrize("key", ["guidance_scale", "NAG_scale", "negative_prompt", "denoising_strength"])
def test_a_setting_is_kept_when_the_preset_would_set_it_otherwise(key: str) -> None:
    presets_own = DEFAULTS | {"guidance_scale": 4, "NAG_scale": 3, "negative_prompt": "blur", "denoising_strength": 0.5}

    assert prune_settings(DEFAULTS, presets_own, {})[key] == DEFAULTS[key]


# ---------------------------------------------------------------------------------------- files


def test_a_failure_while_writing_leaves_nothing(tmp_path: Path) -> None:
    def fail_halfway(file: Any) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(RunError, match=r"a\.png could not be written: No space left on device"):
        write_file(tmp_path / "a.png", fail_halfway)

    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_the_file_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(b"before")
    monkeypatch.setattr(os, "replace", _refuse)

    with pytest.raises(RunError, match="Permission denied"):
        save_image(tmp_path / "a.png", PICTURE, RECORD)

    assert (tmp_path / "a.png").read_bytes() == b"before"
    assert len(list(tmp_path.iterdir())) == 1


def test_an_interrupt_while_writing_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(file: Any) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_file(tmp_path / "a.png", interrupt)

    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no file modes")
def test_a_saved_picture_has_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()

    save_image(tmp_path / "a.png", PICTURE, RECORD)

    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("usual", "a.png")]
    assert modes[0] == modes[1]


def _refuse(*_: Any) -> None:
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
