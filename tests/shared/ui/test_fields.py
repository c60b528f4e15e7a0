"""The form of a preset: what is offered, and what of it becomes an order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shared.ui.fields import CUSTOM, fields_for, find_loras, overrides, preset_choices, size_label


def entered(**changes: Any) -> dict[str, Any]:
    """Values of the page's components as gradio hands them over."""
    return {
        "prompt": "a red circle", "negative_prompt": "blue", "resolution": "256x256", "width": 640, "height": 480,
        "num_inference_steps": 8, "guidance_scale": 4.0, "seed": -1, "batch_size": 1, "activated_loras": [],
        "loras_multipliers": "", "error_lora_strength": 1.0, "flow_shift": 3.0, "sample_solver": None,
        "NAG_scale": 1.0, "NAG_tau": 3.5, "NAG_alpha": 0.5,
    } | changes  # fmt: skip


def test_sizes_keep_the_area_of_the_presets_own_and_the_grid_of_the_model(preset_of) -> None:
    fields = fields_for(preset_of(settings={"resolution": "1024x1024"}), {})
    sizes = [tuple(map(int, value.split("x"))) for _, value in fields.resolutions if value != CUSTOM]

    assert fields.resolution == "1024x1024"
    assert len(sizes) == 7
    assert all(width % 16 == 0 and height % 16 == 0 for width, height in sizes)
    assert all(0.95 < width * height / 1024**2 < 1.05 for width, height in sizes)


def test_a_nag_alpha_of_0_is_shown_as_it_is(preset_of) -> None:
    fields = fields_for(preset_of(model_def={"NAG": True}), {"NAG_alpha": 0.0, "NAG_tau": None})

    assert (fields.NAG_alpha, fields.NAG_tau) == (0.0, 3.5)


def test_sizes_of_the_model_definition_win_and_the_default_is_never_missing(preset_of) -> None:
    listed = {"resolutions": [["Wide", "384x256"], "256x384"]}
    fields = fields_for(preset_of(model_def=listed, settings={"resolution": "256x256"}), {})

    assert fields.resolutions == (
        ("Wide", "384x256"),
        ("256 × 384 · portrait 2:3", "256x384"),
        ("256 × 256 · square", "256x256"),
        ("Custom size", CUSTOM),
    )


def test_a_size_that_is_not_offered_opens_as_custom(preset_of) -> None:
    fields = fields_for(preset_of(), {"resolution": "272x400"})

    assert (fields.resolution, fields.width, fields.height) == (CUSTOM, 272, 400)


@pytest.mark.parametrize(
    ("model_def", "guidance", "nag_scale", "expected"),
    [({}, 4.0, 5.0, False), ({"guidance_max_phases": 1}, 4.0, 1.0, True), ({"guidance_max_phases": 1}, 0.0, 1.0, False),
     ({"guidance_optional": True}, 2.0, 1.0, True), ({"NAG": True}, 0.0, 1.0, False), ({"NAG": True}, 0.0, 1.5, True)],
)  # fmt: skip
def test_a_negative_prompt_is_offered_where_it_changes_the_picture(
    preset_of, model_def, guidance, nag_scale, expected
) -> None:
    assert fields_for(preset_of(model_def=model_def), {}).uses_negative_prompt(guidance, nag_scale) is expected


def test_an_order_leaves_out_what_the_model_does_not_know(preset_of) -> None:
    order = overrides(fields_for(preset_of(), {}), entered())

    assert order == {
        "prompt": "a red circle", "resolution": "256x256", "num_inference_steps": 8, "seed": -1, "batch_size": 1,
        "activated_loras": [], "error_lora_strength": 1.0,
    }  # fmt: skip


def test_an_order_holds_guidance_shift_and_negative_prompt_where_the_model_knows_them(preset_of) -> None:
    fields = fields_for(preset_of(model_def={"guidance_max_phases": 1, "flow_shift": True}), {})
    order = overrides(fields, entered(flow_shift=6.0))

    assert (order["guidance_scale"], order["flow_shift"], order["negative_prompt"]) == (4.0, 6.0, "blue")
    assert "NAG_scale" not in order


def test_an_order_holds_nag_where_the_model_offers_it(preset_of) -> None:
    fields = fields_for(preset_of(model_def={"NAG": True}), {})
    order = overrides(fields, entered(NAG_scale=5.0))

    assert (order["NAG_scale"], order["NAG_tau"], order["NAG_alpha"], order["negative_prompt"]) == (5, 3.5, 0.5, "blue")


def test_a_custom_size_is_taken_from_its_two_fields_and_an_empty_field_is_left_to_the_preset(preset_of) -> None:
    order = overrides(fields_for(preset_of(), {}), entered(resolution=CUSTOM, seed=None))

    assert order["resolution"] == "640x480"
    assert "seed" not in order


def test_lora_files_are_found_in_subfolders_by_their_ending(tmp_path: Path) -> None:
    for name in ("b.safetensors", "styles/a.sft", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    assert find_loras(tmp_path) == ("b.safetensors", "styles/a.sft")
    assert find_loras(tmp_path / "missing") == ()


def test_a_chosen_lora_that_is_gone_is_not_chosen(preset_of) -> None:
    saved = {"activated_loras": ["here.sft", "gone.sft"], "loras_multipliers": "1 0.5"}
    fields = fields_for(preset_of(), saved, ["here.sft"])

    assert fields.activated_loras == ("here.sft",)


def test_a_preset_is_listed_with_its_family_once(preset_of) -> None:
    groups = [("Z-Image", [preset_of(id="a", name="Turbo"), preset_of(id="b", name="Z-Image Base")])]

    assert preset_choices(groups) == [("Z-Image · Turbo", "a"), ("Z-Image Base", "b")]


def test_size_labels_name_shape_and_ratio() -> None:
    assert size_label(1024, 1024) == "1024 × 1024 · square"
    assert size_label(1360, 768) == "1360 × 768 · landscape 16:9"
    assert size_label(208, 320) == "208 × 320 · portrait 2:3"
