"""The preset that is advised fits the machine's memory and its tensor cores; the program's own is the last resort."""

from __future__ import annotations

import json
import os
from argparse import Namespace
from pathlib import Path

import pytest

from models.z_image.variants import PUBLISHED_SHAPES
from shared.app.advice import Advice, advise
from shared.app.context import AppContext
from shared.app.device import DeviceInfo
from shared.app.weight_formats import format_of_name
from tests.support.fake_family import FakeHandler, fake_context, write_preset

PROGRAM = Path(__file__).parents[3]
GIB = 2**30
HUB = "https://huggingface.co/owner/repo/resolve/main"
FILES = {
    "bf16": "model_bf16.safetensors",
    "int8": "model_quanto_bf16_int8.safetensors",
    "int4": "svdq-int4_r128-model.safetensors",
    "fp4": "svdq-fp4_r128-model.safetensors",
}
# Published sizes of Z-Image's files, 10^9 bytes: transformer and text encoder. The VAE is the program's own here.
SIZES = {"bf16": (12.31, 8.04), "int8": (6.89, 4.41), "int4": (4.01, 4.41), "fp4": (4.2, 4.41)}


@pytest.fixture
def ctx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AppContext:
    """Presets of a 6B model in four formats, to download, and the program's own small one."""
    shapes = lambda self, architecture: PUBLISHED_SHAPES  # noqa: E731
    monkeypatch.setattr(FakeHandler, "query_published_shapes", shapes, raising=False)
    write_preset(tmp_path, "z_image_demo")
    encoder = [f"{HUB}/encoder_quanto_bf16_int8.safetensors"]
    for name, file in FILES.items():
        te = [f"{HUB}/encoder_bf16.safetensors"] if name == "bf16" else encoder
        weighs = dict(zip(("transformer", "text_encoder"), SIZES[name], strict=True))
        write_preset(tmp_path, name, URLs=[f"{HUB}/{file}"], text_encoder_URLs=te, gigabytes=weighs)
    return fake_context(tmp_path, FakeHandler())


def card(gib: int, capability: int) -> DeviceInfo:
    return DeviceInfo("cuda", "Card", capability, gib * GIB, "a test's card")


def given(ctx: AppContext, device: DeviceInfo, *, ram: int = 64 * GIB, dtype: str = "bfloat16") -> Advice:
    found = advise(ctx, device, dtype, ram, {"int8", "svdq"})
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("gib", "capability", "preset"),
    [(48, 89, "bf16"), (24, 86, "bf16"), (12, 89, "int8"), (8, 89, "int4"), (8, 120, "fp4")],
)
def test_memory_and_tensor_cores_decide(ctx: AppContext, gib: int, capability: int, preset: str) -> None:
    assert given(ctx, card(gib, capability)).preset == preset


@pytest.mark.parametrize(
    ("capability", "refused", "words"),
    [(89, "fp4", "10.0"), (90, "fp4", "10.0"), (120, "int4", "12.0")],
)
def test_a_format_that_the_tensor_cores_lack_is_refused_with_the_reason(
    ctx: AppContext, capability: int, refused: str, words: str
) -> None:
    others = {verdict.preset: verdict for verdict in given(ctx, card(24, capability)).others}

    assert words in others[refused].refusal


def test_without_a_gpu_little_ram_leaves_the_programs_own_model(ctx: AppContext) -> None:
    found = given(ctx, DeviceInfo("cpu", "CPU", None, 6 * GIB, "no GPU"), ram=6 * GIB)

    assert found.preset == "z_image_demo" and "came with the program" in found.reason
    assert found.to_download == 0 and found.caveats == ()


def test_without_a_gpu_a_mapped_model_need_not_fit_the_ram_with_its_text_encoder(ctx: AppContext) -> None:
    cpu = DeviceInfo("cpu", "CPU", None, 18 * GIB, "no GPU")

    found = given(ctx, cpu, ram=18 * GIB)

    assert found.preset == "bf16", "12.3 GB, and 8.0 GB that are let go of"
    others = {verdict.preset: verdict for verdict in given(ctx, cpu, ram=14 * GIB).others}
    assert "14.0 GiB" in others["bf16"].refusal, "2 GiB are the system's"


def test_without_a_gpu_much_ram_allows_16_bits_and_warns_of_the_time(ctx: AppContext) -> None:
    found = given(ctx, DeviceInfo("cpu", "CPU", None, 64 * GIB, "no GPU"))

    assert found.preset == "bf16" and any("minutes" in caveat for caveat in found.caveats)
    assert found.to_download == pytest.approx(20.5e9, rel=0.01)


def test_a_cpu_that_computes_in_float32_keeps_16_bit_weights_as_they_are(ctx: AppContext) -> None:
    found = {
        ram: given(ctx, DeviceInfo("cpu", "CPU", None, ram * GIB, "no GPU"), ram=ram * GIB, dtype="float32")
        for ram in (24, 18)
    }

    assert (found[24].preset, found[18].preset) == ("bf16", "int8")
    assert "RAM" in {verdict.preset: verdict for verdict in found[18].others}["bf16"].refusal


def test_an_old_gpu_is_warned_of_float16(ctx: AppContext) -> None:
    assert any("float16" in caveat for caveat in given(ctx, card(24, 75), dtype="float16").caveats)
    assert not any("float16" in caveat for caveat in given(ctx, card(24, 80)).caveats)


def test_weights_that_are_only_expanded_are_called_so(ctx: AppContext) -> None:
    assert any("not time" in caveat for caveat in given(ctx, card(12, 89)).caveats)


def test_a_gpu_with_too_little_ram_beside_it_does_not_stream(ctx: AppContext) -> None:
    assert given(ctx, card(8, 89), ram=6 * GIB).preset == "z_image_demo"


def test_what_is_to_download_is_what_presets_state_less_what_is_here(ctx: AppContext) -> None:
    whole = given(ctx, card(12, 89))
    target = ctx.files.target(f"{HUB}/{FILES['int8']}")
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.0123456789ab.part")
    part.touch()
    os.truncate(part, 10**9)

    assert whole.to_download == 11_300_000_000
    assert given(ctx, card(12, 89)).to_download == 10_300_000_000


def test_a_file_that_is_damaged_is_refused_and_another_advised(ctx: AppContext) -> None:
    (ctx.root / "weights/z_image_demo/transformer.safetensors").write_bytes(b"no tensors")

    found = given(ctx, card(48, 89))

    others = {verdict.preset: verdict for verdict in found.others}
    assert found.preset == "bf16" and "transformer.safetensors" in others["z_image_demo"].refusal


def test_a_guided_model_of_many_passes_comes_after_a_fast_one(ctx: AppContext) -> None:
    settings = {"num_inference_steps": 30, "guidance_scale": 4}
    write_preset(ctx.root, "a_base", URLs=[f"{HUB}/a_bf16.safetensors"], settings=settings)
    ctx.refresh_presets()

    found = given(ctx, card(48, 89))

    assert found.preset == "bf16"
    assert {verdict.preset: verdict.passes for verdict in found.others}["a_base"] == 60


def test_nothing_is_advised_when_nothing_can_be_used(ctx: AppContext) -> None:
    for file in ctx.root.glob("weights/z_image_demo/*"):
        file.unlink()

    assert advise(ctx, DeviceInfo("cpu", "CPU", None, GIB, "no GPU"), "float32", GIB) is None


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("ZImageTurbo_bf16.safetensors", "16 bit"),
        ("ZImageTurbo_quanto_bf16_int8.safetensors", "int8"),
        ("svdq-int4_r256-z-image-turbo.safetensors", "SVDQuant INT4"),
        ("svdq-fp4_r128-z-image-turbo.safetensors", "SVDQuant FP4"),
        ("z_image_turbo_nvfp4.safetensors", "NVFP4"),
        ("z_image_turbo_nvfp4_mixed.safetensors", "NVFP4 + MXFP8"),
        ("z-image-turbo_fp8_scaled_e4m3fn_KJ.safetensors", "FP8"),
        ("z_image_turbo-Q8_0.gguf", "GGUF Q8"),
        ("z_image_turbo-Q4_K_M.gguf", "GGUF Q4"),
    ],
)
def test_a_files_name_tells_its_format(file: str, name: str) -> None:
    assert format_of_name(f"{HUB}/{file}").name == name


@pytest.mark.parametrize("capability", [75, 80, 89, 90, 100, 120])
@pytest.mark.parametrize("gib", [6, 8, 12, 16, 24, 80])
def test_the_shipped_presets_hold_an_answer_for_every_card(gib: int, capability: int) -> None:
    ctx = AppContext.create(Namespace(), PROGRAM)

    found = advise(ctx, card(gib, capability), "float16" if capability < 80 else "bfloat16", 64 * GIB, {"svdq"})

    assert found is not None and found.reason
    assert json.dumps([verdict.refusal for verdict in found.others])
    name = format_of_name(ctx.presets.get(found.preset).urls[0]).name
    assert capability >= 100 or "FP4" not in name
    assert capability < 120 or "INT4" not in name
