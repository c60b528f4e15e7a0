"""The object a host holds: what it loads, calls back, returns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from models.z_image.z_image_main import model_factory
from shared.quant.checkpoint import Checkpoint
from shared.quant.errors import UserError


@pytest.fixture(scope="module")
def processor(model_folder: Path) -> model_factory:
    return model_factory(model_filename=[str(model_folder / "transformer.safetensors")], dtype=torch.float32)


def draw(processor: model_factory, **kwargs: Any) -> torch.Tensor | None:
    return processor.generate(
        **{"input_prompt": "x", "seed": 1, "width": 32, "height": 48, "sampling_steps": 3} | kwargs
    )


def test_a_batch_comes_back_channels_first_in_range(processor: model_factory) -> None:
    pictures = draw(processor, batch_size=2)

    assert pictures is not None
    assert (pictures.shape, pictures.dtype) == ((3, 2, 48, 32), torch.float32)
    assert -1 <= float(pictures.min()) <= float(pictures.max()) <= 1


def test_the_callback_hears_the_total_and_then_each_step(processor: model_factory) -> None:
    calls: list[tuple] = []

    draw(
        processor,
        callback=lambda i, latents, start, total=None: calls.append(
            (i, None if latents is None else tuple(latents.shape), start, total)
        ),
    )

    assert calls == [(-1, None, True, 3)] + [(i, (16, 1, 6, 4), False, None) for i in range(3)]


def test_interrupt_stops_within_one_step(processor: model_factory) -> None:
    steps: list[int] = []

    def callback(i: int, latents: torch.Tensor | None, start: bool, total: int | None = None) -> None:
        steps.append(i)
        processor._interrupt = i == 0

    assert draw(processor, callback=callback) is None
    assert steps == [-1, 0]
    processor._interrupt = False


def test_the_report_says_what_was_done(processor: model_factory) -> None:
    draw(processor)

    assert processor.report["forwards"] == 3
    assert len(processor.report["sigmas"]) == 4
    assert all(s >= 0 for s in processor.report["seconds"].values())


def test_forwards_are_counted_while_they_are_made(processor: model_factory) -> None:
    counts: list[int] = []

    draw(processor, sample_solver="heun", callback=lambda i, *_: counts.append(processor.report["forwards"]))

    assert counts == [0, 2, 4, 5]


def test_a_lora_changes_the_picture_and_leaves_when_told(processor: model_factory, tmp_path: Path) -> None:
    base = "transformer.layers.0.feed_forward.w2"
    save_file(
        {f"{base}.lora_A.weight": torch.randn(8, 1024), f"{base}.lora_B.weight": torch.randn(384, 8)},
        tmp_path / "l.safetensors",
    )
    plain = draw(processor)

    processor.load_loras([tmp_path / "l.safetensors"], [1.0])
    changed = draw(processor)
    processor.load_loras([], [])

    assert not torch.equal(plain, changed)
    assert torch.equal(draw(processor), plain)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        ("layers.0.feed_forward.w2", (384, 1024)),
        pytest.param("context_refiner.0.feed_forward.w2", (384, 1024), id="captions are refined once for all steps"),
        pytest.param("layers.0.adaLN_modulation.0", (1536, 256), id="scales and gates are worked out once, too"),
        pytest.param("layers.0.ffn_norm1", (384,), id="norms hold them"),
    ],
)
def test_a_strength_may_change_at_every_step(
    processor: model_factory, tmp_path: Path, module: str, shape: tuple[int, ...]
) -> None:
    base = f"transformer.{module}"
    state = {f"{base}.diff": torch.randn(shape)}
    if len(shape) > 1:
        state = {f"{base}.lora_A.weight": torch.randn(8, shape[1]), f"{base}.lora_B.weight": torch.randn(shape[0], 8)}
    save_file(state, tmp_path / "l.safetensors")

    def steps() -> list[torch.Tensor]:
        seen: list[torch.Tensor] = []
        draw(processor, callback=lambda i, latents, *_: None if latents is None else seen.append(latents.clone()))
        return seen

    plain = steps()
    processor.load_loras([tmp_path / "l.safetensors"], [((0,), (1,))])
    changed, again = steps(), steps()
    processor.load_loras([], [])

    # Of three steps the first phase has two.
    assert [torch.equal(a, b) for a, b in zip(plain, changed, strict=True)] == [True, True, False]
    assert all(torch.equal(a, b) for a, b in zip(changed, again, strict=True))


def test_a_lora_on_the_text_encoder_encodes_the_prompt_anew(processor: model_factory, tmp_path: Path) -> None:
    base = "lora_te_model_layers_0_self_attn_q_proj"
    state = {f"{base}.lora_down.weight": torch.randn(8, 64), f"{base}.lora_up.weight": torch.randn(64, 8)}
    save_file(state, tmp_path / "l.safetensors")
    plain = draw(processor)

    (match,) = processor.load_loras([tmp_path / "l.safetensors"], [1.0])
    changed = draw(processor)
    processor.load_loras([], [])

    assert (match.matched, match.total) == (2, 2)
    assert not torch.equal(plain, changed)
    assert torch.equal(draw(processor), plain)


def test_parts_that_another_has_loaded_are_taken_over_and_no_file_is_opened_for_them(
    processor: model_factory, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    read = Checkpoint.open
    monkeypatch.setattr(Checkpoint, "open", lambda path: (opened.append(Path(path).name), read(path))[1])
    names = ("text_encoder", "vae", "tokenizer")

    second = model_factory(
        model_filename=str(model_folder / "transformer.safetensors"),
        dtype=torch.float32,
        parts={name: getattr(processor, name) for name in names},
    )

    assert opened == ["transformer.safetensors"]
    assert all(getattr(second, name) is getattr(processor, name) for name in names)
    assert second.transformer is not processor.transformer
    second.device = processor.device
    assert torch.equal(draw(second), draw(processor))


def test_missing_parts_are_asked_for_by_role(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lonely = tmp_path / "transformer.safetensors"
    lonely.symlink_to(model_folder / "transformer.safetensors")

    with pytest.raises(UserError, match=r"No text encoder was given and none was found"):
        model_factory(model_filename=lonely)
    with pytest.raises(UserError, match=r"nowhere\.safetensors: there is no such file"):
        model_factory(model_filename="nowhere.safetensors")
