"""The part of the page that draws from pictures: a start picture with a painted mask, a control picture, margins,
references."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
from PIL import Image, ImageChops

from shared.app.annotators import fetch
from shared.app.edit_settings import AREAS, EditSettings, preprocessor_choices
from shared.app.editing import INPUTS, open_edit
from shared.app.metadata import write_file
from shared.app.pictures import FITS
from shared.app.presets import Preset
from shared.app.settings import GenerationSettings

if TYPE_CHECKING:
    from shared.app.download import FileStore

DEFAULT_STRENGTH = 0.6  # for a picture without a mask, as `generate --image` has it
_PAINT = "#e5484d"  # seen on dark and light pictures alike; only its opacity counts
_CANVAS = (512, 512)  # pixels, while there is no picture; then it has the picture's own size
_PLAIN: dict[str, Any] = {"buttons": []}  # a slider without the button that resets it


@dataclass(frozen=True, slots=True, kw_only=True)
class EditPanel:
    """The components. Names of those that hold a setting are settings keys; `editor` holds picture and mask."""

    group: gr.Accordion
    editor: gr.ImageEditor
    denoising_strength: gr.Slider
    mask_expand: gr.Slider
    mask_feather: gr.Slider
    inpaint_area: gr.Dropdown
    image_fit: gr.Dropdown
    outpaint: gr.Textbox
    tile_scale: gr.Slider
    hires_scale: gr.Slider
    hires_strength: gr.Slider
    control_group: gr.Accordion
    image_guide: gr.Image
    control_preprocessor: gr.Dropdown
    control_net_weight: gr.Slider
    control_start: gr.Slider
    control_end: gr.Slider
    preview: gr.Button
    preview_image: gr.Image
    references_group: gr.Accordion
    image_refs: gr.Gallery


def build_edit_panel() -> EditPanel:
    """Lay the panel out, closed; `edit_updates` fits it to a preset."""
    return EditPanel(**_build_source(), **_build_second_pass(), **_build_control(), **_build_references())


def _build_source() -> dict[str, Any]:
    """The given picture, what of it is redrawn, and what is drawn around it."""
    usual = EditSettings()
    with gr.Accordion("Draw from a picture", elem_id="edit", open=False) as group:
        editor = gr.ImageEditor(
            label="Paint what to redraw", elem_id="editor", type="pil", format="png", height=360,
            sources=["upload", "clipboard"], transforms=(), canvas_size=_CANVAS, layers=False,
            brush=gr.Brush(colors=[_PAINT], default_color=_PAINT, color_mode="fixed"),
        )  # fmt: skip
        denoising_strength = gr.Slider(
            0, 1, value=DEFAULT_STRENGTH, step=0.05, label="Denoising strength", elem_id="denoising-strength",
            info="How much is drawn anew; in paint, 1 is usual.", **_PLAIN,
        )  # fmt: skip
        with gr.Row():
            mask_expand = gr.Slider(-64, 64, value=usual.mask_expand, step=1, label="Grow the mask", **_PLAIN)
            mask_feather = gr.Slider(0, 64, value=usual.mask_feather, step=1, label="Fade its edge", **_PLAIN)
        inpaint_area = gr.Dropdown(
            label="Area", choices=[(words.capitalize(), name) for name, words in AREAS.items()],
            value=usual.inpaint_area, elem_id="inpaint-area",
        )  # fmt: skip
        image_fit = gr.Dropdown(
            label="A picture of another shape", choices=[(words.capitalize(), name) for name, words in FITS.items()],
            value=usual.image_fit, elem_id="image-fit",
        )  # fmt: skip
        outpaint = gr.Textbox(
            label="Draw around it", elem_id="outpaint", placeholder="left=128,bottom=64",
            info="Pixels by side, or all=64.",
        )  # fmt: skip
        tile_scale = gr.Slider(
            1, 4, value=usual.tile_scale, step=0.5, label="Enlarge it tile by tile", elem_id="tile-scale", **_PLAIN
        )
    return {
        "group": group,
        "editor": editor,
        "denoising_strength": denoising_strength,
        "mask_expand": mask_expand,
        "mask_feather": mask_feather,
        "inpaint_area": inpaint_area,
        "image_fit": image_fit,
        "outpaint": outpaint,
        "tile_scale": tile_scale,
    }


def _build_second_pass() -> dict[str, Any]:
    """The drawing over an enlarged picture."""
    usual = EditSettings()
    with gr.Accordion("Second pass", elem_id="hires", open=False):
        hires_scale = gr.Slider(
            1, 3, value=usual.hires_scale, step=0.25, label="Size", elem_id="hires-scale",
            info="The finished picture is enlarged and drawn over; 1 leaves it.", **_PLAIN,
        )  # fmt: skip
        hires_strength = gr.Slider(
            0.05, 1, value=usual.hires_strength, step=0.05, label="Denoising strength", elem_id="hires-strength",
            **_PLAIN,
        )  # fmt: skip
    return {
        "hires_scale": hires_scale,
        "hires_strength": hires_strength,
    }


def _build_control() -> dict[str, Any]:
    """The picture that a ControlNet is shown."""
    usual = EditSettings()
    with gr.Accordion("Control picture", elem_id="control", open=False, visible=False) as control_group:
        image_guide = gr.Image(
            label="Control picture", elem_id="image-guide", type="filepath", image_mode=None, height=240,
            sources=["upload", "clipboard"],
        )  # fmt: skip
        control_preprocessor = gr.Dropdown(
            label="Turn it into", choices=preprocessor_choices(), value=usual.control_preprocessor,
            elem_id="control-preprocessor",
        )  # fmt: skip
        control_net_weight = gr.Slider(0, 2, value=0.75, step=0.05, label="Weight", elem_id="control-weight", **_PLAIN)
        with gr.Row():
            control_start = gr.Slider(0, 1, value=usual.control_start, step=0.05, label="From", **_PLAIN)
            control_end = gr.Slider(0, 1, value=usual.control_end, step=0.05, label="To, share of the steps", **_PLAIN)
        preview = gr.Button("Show what the model sees", elem_id="control-preview", size="md")
        preview_image = gr.Image(
            show_label=False, elem_id="control-seen", interactive=False, height=240, visible=False, format="png"
        )
    return {
        "control_group": control_group,
        "image_guide": image_guide,
        "control_preprocessor": control_preprocessor,
        "control_net_weight": control_net_weight,
        "control_start": control_start,
        "control_end": control_end,
        "preview": preview,
        "preview_image": preview_image,
    }


def _build_references() -> dict[str, Any]:
    """Pictures that an Omni model goes by."""
    with gr.Accordion("Reference pictures", elem_id="references", open=False, visible=False) as references_group:
        image_refs = gr.Gallery(
            label="Pictures to go by, which the prompt speaks of", elem_id="image-refs", type="filepath", columns=3,
            height=240, sources=["upload", "clipboard"], file_types=["image"], interactive=True,
        )  # fmt: skip
    return {
        "references_group": references_group,
        "image_refs": image_refs,
    }


def edit_inputs(panel: EditPanel) -> dict[str, Any]:
    """The components a generation reads, by name."""
    shown = ("group", "control_group", "references_group", "preview", "preview_image")
    return {field.name: getattr(panel, field.name) for field in fields(panel) if field.name not in shown}


def edit_outputs(panel: EditPanel) -> list[Any]:
    """Every component that `edit_updates` may change."""
    return [getattr(panel, field.name) for field in fields(panel) if field.name not in ("group", "preview")]


def edit_updates(panel: EditPanel, preset: Preset, values: Mapping[str, Any], folder: Path) -> dict[Any, Any]:
    """Fit the panel to a preset and fill it with `values` (settings, or the record of a picture).

    folder: where the pictures that a record names are kept. Without a picture in `values` the one there stays.
    """
    settings = {**preset.settings, **values}
    weight = settings.get("control_net_weight")
    updates: dict[Any, Any] = {
        panel.control_group: gr.update(visible=has_control(preset)),
        panel.control_net_weight: 0.75 if weight is None else float(weight),
        panel.preview_image: gr.update(visible=False),
        panel.references_group: gr.update(visible=takes_references(preset)),
    }
    usual = EditSettings()
    for field in fields(EditSettings):
        component = getattr(panel, field.name, None)
        if component is not None and field.name not in ("image_guide", "image_refs"):
            value = settings.get(field.name)
            updates[component] = getattr(usual, field.name) if value in (None, "") else value
    if values.get("image_start"):
        updates[panel.denoising_strength] = float(settings.get("denoising_strength") or 1)
        updates[panel.editor] = _drawing_of(folder, str(values["image_start"]), str(values.get("image_mask") or ""))
    if values.get("image_guide"):
        guide = folder / str(values["image_guide"])
        updates[panel.image_guide] = str(guide) if guide.is_file() else None
    if values.get("image_refs"):
        references = [folder / str(name) for name in values["image_refs"]]
        updates[panel.image_refs] = [str(path) for path in references if path.is_file()]
    return updates


def edit_overrides(preset: Preset, entered: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What the user entered, under the host's key names; pictures are written into `folder`/inputs first.

    entered: values of edit_inputs() by name; what was left empty is None and is left out.
    """
    picture, mask = _picture_and_mask(entered.get("editor"))
    taken = {key: entered.get(key) for key in ("hires_scale", "hires_strength")}
    if picture is not None:
        keys = ("mask_expand", "mask_feather", "inpaint_area", "image_fit", "outpaint", "tile_scale")
        taken |= {key: entered.get(key) for key in (*keys, "denoising_strength")}
        taken["image_start"] = str(_keep(picture, folder))
        taken["image_mask"] = "" if mask is None else str(_keep(mask, folder))
    if has_control(preset):
        taken |= {key: entered.get(key) for key in ("control_net_weight", "image_fit")}
        if entered.get("image_guide"):
            of_control = ("image_guide", "control_preprocessor", "control_start", "control_end")
            taken |= {key: entered.get(key) for key in of_control}
    if takes_references(preset) and entered.get("image_refs"):
        taken["image_refs"] = [str(path) for path, _caption in entered["image_refs"]]
    return {key: value for key, value in taken.items() if value is not None}


def control_preview(preset: Preset, settings: GenerationSettings, folder: Path, files: FileStore) -> Image.Image:
    """What the ControlNet will be shown; a preprocessor's model is downloaded first. Raises UserError when that is
    nothing, RunError when there is no network."""
    edit = open_edit(settings, preset.model_def, folder)
    return edit.with_preprocessor(fetch(files, settings.edit)).control_preview()


def has_control(preset: Preset) -> bool:
    """Whether the preset's model can be steered by a control picture."""
    return "guide_preprocessing" in preset.model_def


def takes_references(preset: Preset) -> bool:
    """Whether the preset's model looks at reference pictures."""
    return "image_ref_choices" in preset.model_def


def _picture_and_mask(value: Mapping[str, Any] | None) -> tuple[Image.Image | None, Image.Image | None]:
    """The editor's picture, and what was painted over it as "L", None where nothing was."""
    if not value or value.get("background") is None:
        return None, None
    picture: Image.Image = value["background"].convert("RGB")
    mask = Image.new("L", picture.size)
    for layer in value.get("layers") or ():
        painted = layer.convert("RGBA").getchannel("A")
        mask = ImageChops.lighter(mask, painted.resize(picture.size))
    return picture, mask if mask.getbbox() else None


def _drawing_of(folder: Path, start: str, mask: str) -> dict[str, Any] | None:
    """An editor's value: the picture and, as its one layer, the mask in paint. None when the picture is gone."""
    if not (folder / start).is_file():
        return None
    layers = []
    if mask and (folder / mask).is_file():
        with Image.open(folder / mask) as opened:
            alpha = opened.convert("L")
        layer = Image.new("RGBA", alpha.size, _PAINT)
        layer.putalpha(alpha)
        layers.append(layer)
    return {"background": str(folder / start), "layers": layers, "composite": None}


def _keep(image: Image.Image, folder: Path) -> Path:
    """The picture as a PNG file below `folder`, named by its content."""
    data = io.BytesIO()
    image.save(data, format="PNG")
    path = folder / INPUTS / f"{hashlib.sha256(data.getvalue()).hexdigest()[:16]}.png"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, lambda file: file.write(data.getvalue()))
    return path
