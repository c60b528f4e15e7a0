"""What the picture panel asks for and shows, without a browser."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import pytest
from PIL import Image

from shared.app.download import FileStore
from shared.app.edit_settings import EditSettings
from shared.app.presets import Preset
from shared.app.settings import GenerationSettings
from shared.quant.errors import UserError
from shared.ui.edit_panel import (
    EditPanel,
    build_edit_panel,
    control_preview,
    edit_inputs,
    edit_overrides,
    edit_updates,
)

CONTROL = {"guide_preprocessing": {"selection": ["V"]}}
OMNI = {"image_ref_choices": {"choices": [("Reference Pictures", "I")]}}


@pytest.fixture
def panel() -> EditPanel:
    with gr.Blocks(analytics_enabled=False):
        return build_edit_panel()


@pytest.fixture
def plain(preset_of: Callable[..., Preset]) -> Preset:
    return preset_of()


@pytest.fixture
def steered(preset_of: Callable[..., Preset]) -> Preset:
    return preset_of(model_def=CONTROL)


def picture(colour: str = "red") -> Image.Image:
    return Image.new("RGB", (40, 30), colour)


def painted(box: tuple[int, int, int, int]) -> Image.Image:
    layer = Image.new("RGBA", (40, 30), (0, 0, 0, 0))
    layer.paste((255, 255, 255, 255), box)
    return layer


def entered(panel: EditPanel, **changes: Any) -> dict[str, Any]:
    """The panel's values as it starts, with changes by name."""
    return {name: getattr(part, "value", None) for name, part in edit_inputs(panel).items()} | changes


def test_an_untouched_panel_asks_for_nothing(panel: EditPanel, plain: Preset, tmp_path: Path) -> None:
    asked = edit_overrides(plain, entered(panel, editor=None, image_guide=None), tmp_path)

    assert EditSettings.build(asked) == EditSettings()
    assert "denoising_strength" not in asked
    assert list(tmp_path.iterdir()) == []


def test_a_picture_without_paint_is_drawn_from_whole(panel: EditPanel, plain: Preset, tmp_path: Path) -> None:
    value = {"background": picture(), "layers": [painted((0, 0, 0, 0))], "composite": None}

    asked = edit_overrides(plain, entered(panel, editor=value), tmp_path)

    assert asked["image_mask"] == ""
    assert asked["denoising_strength"] == 0.6
    with Image.open(asked["image_start"]) as kept:
        assert np.array_equal(np.asarray(kept), np.asarray(picture()))


def test_paint_becomes_the_mask(panel: EditPanel, plain: Preset, tmp_path: Path) -> None:
    value = {"background": picture(), "layers": [painted((0, 0, 10, 30)), painted((20, 0, 25, 30))], "composite": None}

    asked = edit_overrides(plain, entered(panel, editor=value, mask_expand=4), tmp_path)

    with Image.open(asked["image_mask"]) as mask:
        assert (np.asarray(mask)[5] > 0).nonzero()[0].tolist() == [*range(10), *range(20, 25)]
    assert asked["mask_expand"] == 4


def test_only_presets_with_a_controlnet_are_given_a_control_picture(
    panel: EditPanel, plain: Preset, steered: Preset, tmp_path: Path
) -> None:
    values = entered(panel, image_guide="pose.png", control_preprocessor="canny", control_net_weight=0.4)

    asked = edit_overrides(steered, values, tmp_path)

    assert (asked["image_guide"], asked["control_preprocessor"], asked["control_net_weight"]) == (
        "pose.png",
        "canny",
        0.4,
    )
    assert not {"image_guide", "control_net_weight"} & set(edit_overrides(plain, values, tmp_path))


def test_the_control_part_shows_with_such_presets_only(
    panel: EditPanel, plain: Preset, steered: Preset, tmp_path: Path
) -> None:
    assert not edit_updates(panel, plain, {}, tmp_path)[panel.control_group]["visible"]
    assert edit_updates(panel, steered, {}, tmp_path)[panel.control_group]["visible"]


def test_a_record_brings_picture_mask_and_control_back(panel: EditPanel, steered: Preset, tmp_path: Path) -> None:
    value = {"background": picture(), "layers": [painted((0, 0, 10, 30))], "composite": None}
    guide = tmp_path / "inputs" / "guide.png"
    asked = edit_overrides(steered, entered(panel, editor=value, denoising_strength=0.3), tmp_path)
    picture("blue").save(guide)
    record = {key: str(Path(asked[key]).relative_to(tmp_path)) for key in ("image_start", "image_mask")}
    record |= {"image_guide": "inputs/guide.png", "denoising_strength": 0.3, "mask_feather": 3}

    shown = edit_updates(panel, steered, record, tmp_path)
    again = edit_overrides(
        steered,
        entered(panel, editor={**shown[panel.editor], "background": Image.open(shown[panel.editor]["background"])}),
        tmp_path,
    )

    assert again["image_start"] == asked["image_start"]
    with Image.open(again["image_mask"]) as mask:
        assert (np.asarray(mask)[5] > 0).nonzero()[0].tolist() == list(range(10))
    assert shown[panel.denoising_strength] == 0.3
    assert shown[panel.mask_feather] == 3
    assert shown[panel.image_guide] == str(guide)


def test_references_are_asked_of_models_that_look_at_them(
    panel: EditPanel, plain: Preset, preset_of: Callable[..., Preset], tmp_path: Path
) -> None:
    omni = preset_of(model_def=OMNI)
    values = entered(panel, image_refs=[("a.png", None), ("b.png", None)])

    assert edit_overrides(omni, values, tmp_path)["image_refs"] == ["a.png", "b.png"]
    assert "image_refs" not in edit_overrides(plain, values, tmp_path)
    assert edit_updates(panel, omni, {}, tmp_path)[panel.references_group]["visible"]
    assert not edit_updates(panel, plain, {}, tmp_path)[panel.references_group]["visible"]


def test_a_record_brings_the_references_back_that_are_still_there(
    panel: EditPanel, preset_of: Callable[..., Preset], tmp_path: Path
) -> None:
    picture().save(tmp_path / "here.png")

    shown = edit_updates(panel, preset_of(model_def=OMNI), {"image_refs": ["here.png", "gone.png"]}, tmp_path)

    assert shown[panel.image_refs] == [str(tmp_path / "here.png")]


def test_a_picture_that_is_gone_leaves_the_editor_empty(panel: EditPanel, plain: Preset, tmp_path: Path) -> None:
    assert edit_updates(panel, plain, {"image_start": "inputs/gone.png"}, tmp_path)[panel.editor] is None


def test_the_preview_is_what_the_model_sees(steered: Preset, tmp_path: Path) -> None:
    picture().save(tmp_path / "c.png")
    edit = EditSettings(image_guide=str(tmp_path / "c.png"), control_preprocessor="gray")
    settings = GenerationSettings(prompt="x", seed=1, width=64, height=48, edit=edit)
    files = FileStore(tmp_path, [tmp_path])

    seen = control_preview(steered, settings, tmp_path, files)

    assert seen.size == (64, 48)
    assert np.ptp(np.asarray(seen), axis=2).max() == 0
    with pytest.raises(UserError, match="no control picture to preview"):
        control_preview(steered, GenerationSettings(prompt="x", seed=1), tmp_path, files)
