"""The subcommands in this process, with a fake model: what goes to stdout, to stderr, and the exit code."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from shared.app.context import AppContext
from shared.cli import commands
from shared.cli.parser import build_parser, parse_arguments
from shared.quant.errors import RunError, UserError
from tests.support.fake_family import FakeHandler, FakeProcessor, fake_context, fake_families, write_preset


@pytest.fixture
def handler() -> FakeHandler:
    return FakeHandler()


@pytest.fixture
def ctx(tmp_path: Path, handler: FakeHandler) -> AppContext:
    write_preset(tmp_path, "z_image_demo", description="Draws " + "very " * 30 + "much.")
    write_preset(tmp_path, "remote", URLs=["https://huggingface.co/owner/repo/resolve/main/remote.safetensors"])
    write_preset(tmp_path, "hidden", visible=False)
    return fake_context(tmp_path, handler)


def run(ctx: AppContext, *arguments: str) -> int:
    args = parse_arguments(build_parser(fake_families(FakeHandler()), "lora_root"), arguments)
    args.gpu = "cpu"
    ctx.args = args
    return {"generate": commands.generate, "presets": commands.presets}[args.command](ctx, args)


def last_json(text: str) -> Any:
    return json.loads(text.splitlines()[-1])


def test_json_is_one_object_in_the_last_line_of_stdout(
    ctx: AppContext, handler: FakeHandler, capsys: pytest.CaptureFixture[str]
) -> None:
    handler.prepare = lambda processor: sys.stdout.write("a library is chatty\n")

    code = run(ctx, "generate", "a fox", "--seed", "5", "--batch-size", "2", "--json")

    captured = capsys.readouterr()
    told = last_json(captured.out)
    assert code == 0
    assert captured.out.count("\n") == 1 and "chatty" in captured.err
    assert [image["seed"] for image in told["images"]] == [5, 6]
    assert all(Path(image["path"]).is_file() for image in told["images"])
    assert told["preset"] == "z_image_demo" and told["forwards"] == 3
    assert set(told["seconds"]) == {"load", "text", "denoise", "decode", "total"}
    assert told["peak_rss_mb"] > 0 and told["peak_vram_mb"] >= 0
    assert all(len(file["sha256"]) == 64 and Path(file["path"]).is_file() for file in told["files"])


def test_without_json_stdout_is_the_paths(ctx: AppContext, capsys: pytest.CaptureFixture[str]) -> None:
    run(ctx, "generate", "a fox", "--output", str(ctx.root / "fox.png"))

    captured = capsys.readouterr()
    assert captured.out == f"{ctx.root / 'fox.png'}\n"
    assert "total" in captured.err


def test_quiet_says_nothing_but_the_paths(ctx: AppContext, capsys: pytest.CaptureFixture[str]) -> None:
    run(ctx, "generate", "a fox", "--output", str(ctx.root / "fox.png"), "--verbose", "0")

    assert capsys.readouterr() == (f"{ctx.root / 'fox.png'}\n", "")


def test_saved_settings_are_the_defaults_and_flags_win(
    ctx: AppContext, handler: FakeHandler, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = ctx.root / "settings" / "z_image_demo_settings.json"
    saved.parent.mkdir()
    saved.write_text(json.dumps({"num_inference_steps": 2, "seed": 9}))

    run(ctx, "generate", "a fox", "--seed", "1", "--json")

    assert handler.processors[0].calls[0]["sampling_steps"] == 2
    assert last_json(capsys.readouterr().out)["images"][0]["seed"] == 1


def test_a_dry_run_tells_the_plan_and_touches_nothing(
    ctx: AppContext, handler: FakeHandler, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run(ctx, "generate", "a fox", "--preset", "remote", "--dry-run", "--json")

    told = last_json(capsys.readouterr().out)
    assert code == 0
    assert told["to_download"] == ["https://huggingface.co/owner/repo/resolve/main/remote.safetensors"]
    assert told["output"] == str(ctx.root / "outputs")
    assert handler.loads == [] and not (ctx.root / "outputs").exists()


def test_a_dry_run_in_words_names_files_choices_and_memory(ctx: AppContext, capsys: pytest.CaptureFixture[str]) -> None:
    run(ctx, "generate", "a fox", "--dry-run")

    words = capsys.readouterr().out
    for part in ("transformer.safetensors", "text_encoder", "number type", "offload", "MiB of RAM", "64x48"):
        assert part in words


def test_a_dry_run_names_sizes_and_the_total_of_a_download(
    ctx: AppContext, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = {"transformer": {"numbers": 10**9, "blocks": 10, "width": 64, "hidden": 256}}
    monkeypatch.setattr(FakeHandler, "query_published_shapes", lambda self, architecture: shapes, raising=False)
    url = "https://huggingface.co/owner/repo/resolve/main/sized.safetensors"
    write_preset(ctx.root, "sized", URLs=[url], gigabytes={"transformer": 2})
    ctx.refresh_presets()

    run(ctx, "generate", "a fox", "--preset", "sized", "--dry-run")

    words = capsys.readouterr().out
    assert f"to download: {url} (2.0 GB)" in words
    assert "To download: 2.0 GB in 1 file" in words
    assert "Memory, estimated from the published sizes (exact once the files are here)" in words
    assert "This machine has" in words


def test_an_interrupt_ends_with_130_and_tells_what_was_kept(
    ctx: AppContext, handler: FakeHandler, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(processor: FakeProcessor, step: int) -> None:
        if len(processor.calls) == 2:
            raise KeyboardInterrupt

    handler.prepare = lambda processor: setattr(processor, "on_call", interrupt)

    code = run(ctx, "generate", "a fox", "--batch-size", "3", "--seed", "5", "--json")

    captured = capsys.readouterr()
    assert code == 130
    assert "1 of 3 pictures" in captured.err
    told = last_json(captured.out)
    assert told["cancelled"] and [image["seed"] for image in told["images"]] == [5]
    assert Path(told["images"][0]["path"]).is_file()


def test_pictures_finished_before_a_failure_are_still_listed(
    ctx: AppContext, handler: FakeHandler, capsys: pytest.CaptureFixture[str]
) -> None:
    def spoil_second(processor: FakeProcessor, step: int) -> None:
        processor.spoil = "picture" if len(processor.calls) == 2 else ""

    handler.prepare = lambda processor: setattr(processor, "on_call", spoil_second)

    with pytest.raises(RunError, match="seed 6"):
        run(ctx, "generate", "a fox", "--batch-size", "2", "--seed", "5")

    assert "_seed5_" in capsys.readouterr().out


def test_an_unknown_preset_names_the_closest(ctx: AppContext) -> None:
    with pytest.raises(UserError) as caught:
        run(ctx, "generate", "a fox", "--preset", "z_image_dmo")

    assert "z_image_demo" in caught.value.hint


def test_presets_are_listed_by_family_with_what_is_missing(ctx: AppContext, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(ctx, "presets") == 0

    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Fake"
    assert any("remote" in line and "to download" in line for line in lines)
    assert not any("hidden" in line for line in lines)
    assert max(map(len, lines)) <= 100


def test_presets_as_json_say_what_is_installed(ctx: AppContext, capsys: pytest.CaptureFixture[str]) -> None:
    run(ctx, "presets", "--json")

    told = {preset["id"]: preset for preset in json.loads(capsys.readouterr().out)}
    assert set(told) == {"z_image_demo", "remote"}
    assert told["z_image_demo"]["installed"] and not told["remote"]["installed"]
    assert told["remote"]["urls"] == ["https://huggingface.co/owner/repo/resolve/main/remote.safetensors"]
    assert set(told["remote"]) == {"id", "name", "family", "architecture", "description", "urls", "installed"}
