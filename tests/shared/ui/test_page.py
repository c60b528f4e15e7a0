"""The callbacks, called as gradio calls them but without a browser: what they ask of the context, what they show."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest
from PIL import Image

from shared.app.download import Located
from shared.quant.errors import RunError, UserError
from shared.ui.edit_panel import build_edit_panel
from shared.ui.generate_panel import build_compose_panel, build_settings_panel, input_components
from shared.ui.page import Page
from shared.ui.result_panel import build_result_panel
from shared.ui.sampling_panel import build_sampling_panel, sampling_components

THIS_PAGE = SimpleNamespace(session_hash="this page")
OTHER_PAGE = SimpleNamespace(session_hash="another page")


@pytest.fixture
def page(context) -> Page:
    with gr.Blocks(analytics_enabled=False):
        return Page(
            ctx=context, compose=build_compose_panel(), settings=build_settings_panel(),
            sampling=build_sampling_panel(), edit=build_edit_panel(), result=build_result_panel(),
        )  # fmt: skip


@pytest.fixture
def entered(page: Page) -> Callable[..., dict[Any, Any]]:
    """Component values of a form filled for the demo preset, with changes by settings key."""

    def fill(**changes: Any) -> dict[Any, Any]:
        values = {
            "preset": "z_image_demo", "prompt": "a red circle", "negative_prompt": "", "resolution": "256x256",
            "width": 256, "height": 256, "num_inference_steps": 4, "guidance_scale": 0, "seed": 5, "batch_size": 1,
            "activated_loras": [], "loras_multipliers": "", "error_lora_strength": 1, "flow_shift": 3,
            "sample_solver": None, "NAG_scale": 1, "NAG_tau": 3.5, "NAG_alpha": 0.5,
        }  # fmt: skip
        parts = input_components(page.compose, page.settings)
        assert set(changes) <= set(values)
        return {parts[name]: value for name, value in (values | changes).items()}

    return fill


def visible(update: dict[str, Any]) -> bool:
    return update["visible"]


# ---- choosing a preset


def test_a_new_page_starts_with_the_demo_and_its_prompt(page: Page) -> None:
    shown = page.opened()

    assert shown[page.compose.preset]["value"] == "z_image_demo"
    assert shown[page.compose.preset]["choices"][0] == ("Fake · Demo", "z_image_demo")
    assert shown[page.compose.prompt] == "a red circle"
    assert shown[page.settings.num_inference_steps]["value"] == 4


def test_a_new_page_starts_with_the_last_model_used_if_it_still_exists(page: Page, context) -> None:
    context.config["last_model_type"] = "guided"
    assert page.opened()[page.compose.preset]["value"] == "guided"

    context.config["last_model_type"] = "deleted"
    assert page.opened()[page.compose.preset]["value"] == "z_image_demo"


def test_a_page_without_any_preset_says_what_to_do(page: Page, context) -> None:
    context.on_disk.clear()
    context.refresh_presets()

    assert "No preset was found" in page.opened()[page.compose.preset_note]


def test_picking_a_preset_shows_the_fields_of_its_model_with_its_defaults(page: Page) -> None:
    shown = page.preset_picked("guided")

    assert shown[page.settings.resolution]["value"] == "512x768"
    assert (visible(shown[page.settings.guidance_scale]), shown[page.settings.guidance_scale]["value"]) == (True, 4.0)
    assert (visible(shown[page.settings.flow_shift]), shown[page.settings.flow_shift]["value"]) == (True, 6.0)
    assert visible(shown[page.compose.negative_prompt])
    assert not visible(shown[page.settings.nag_group])
    assert page.compose.prompt not in shown  # what the user typed stays


def test_the_users_saved_defaults_win_over_the_presets(page: Page, context) -> None:
    context.saved["guided"] = {"num_inference_steps": 12}

    assert page.preset_picked("guided")[page.settings.num_inference_steps]["value"] == 12


def test_saved_defaults_that_make_no_sense_are_named_and_left_out(page: Page, context) -> None:
    context.saved["guided"] = {"num_inference_steps": "many"}
    shown = page.preset_picked("guided")

    assert "num_inference_steps" in shown[page.compose.preset_note]
    assert shown[page.settings.num_inference_steps]["value"] == 30


def test_picking_a_preset_that_was_taken_away_is_a_message(page: Page) -> None:
    assert "deleted" in page.preset_picked("deleted")[page.result.status]


def test_a_preset_whose_files_are_missing_says_so_before_the_wait(page: Page, context) -> None:
    context.files.locate = lambda url, **_: Located(None)
    context.files.received = lambda url, **_: 0

    assert "download of 1 file" in page.preset_picked("z_image_demo")[page.compose.preset_note]


def test_what_a_picture_takes_stands_under_the_model(page: Page) -> None:
    note = page.preset_picked("guided")[page.compose.preset_note]

    assert '<p class="memory">Takes 2 GiB at' in note


def test_a_download_is_told_with_its_size_beside_what_a_picture_takes(page: Page, context) -> None:
    context.files.locate = lambda url, **_: Located(None)
    context.files.received = lambda url, **_: 0
    context.session.download = SimpleNamespace(words="20.5 GB in 3 files")

    note = page.preset_picked("z_image_demo")[page.compose.preset_note]

    assert '<p class="memory">Takes 2 GiB at' in note
    assert "wait for a download of 20.5 GB in 3 files." in note


def test_a_plan_that_cannot_be_made_leaves_the_line_out(page: Page, context) -> None:
    context.session.refusal = UserError("The LoRA file is gone.")

    assert "memory" not in page.preset_picked("guided")[page.compose.preset_note]


def test_refresh_reads_presets_again_and_keeps_the_choice(page: Page, context, preset_of) -> None:
    context.on_disk.append(preset_of(id="new", name="New"))
    shown = page.refreshed("guided")

    assert ("Fake · New", "new") in shown[page.compose.preset]["choices"]
    assert shown[page.compose.preset]["value"] == "guided"


def test_refresh_with_a_broken_preset_file_says_which_and_keeps_the_old_ones(page: Page, context) -> None:
    def broken() -> None:
        raise UserError("defaults/a.json: not valid JSON")

    context.refresh_presets = broken

    assert "defaults/a.json" in page.refreshed("guided")[page.compose.preset_note]
    assert page.compose.preset not in page.refreshed("guided")


def test_nag_above_one_and_guidance_above_zero_bring_the_negative_prompt(page: Page) -> None:
    assert not visible(page.guidance_moved("nag", 0, 1.0))
    assert visible(page.guidance_moved("nag", 0, 1.5))
    assert not visible(page.guidance_moved("z_image_demo", 0, 1.5))
    assert visible(page.guidance_moved("guided", 2.0, 1.0))
    assert not visible(page.guidance_moved("guided", 0, 1.0))


def test_lora_files_of_the_family_are_offered_and_ordered(page: Page, context, entered) -> None:
    assert not visible(page.preset_picked("guided")[page.settings.lora_group])

    context.loras.mkdir()
    (context.loras / "style.safetensors").touch()
    shown = page.preset_picked("guided")
    assert visible(shown[page.settings.lora_group])
    assert shown[page.settings.activated_loras]["choices"] == ["style.safetensors"]

    list(page.draw(entered(activated_loras=["style.safetensors"], loras_multipliers="0.5"), THIS_PAGE))
    [(_, settings)] = context.session.orders
    assert [(lora.file, lora.multiplier) for lora in settings.loras] == [("style.safetensors", "0.5")]


def test_the_lora_that_corrects_packing_is_offered_where_it_lies_beside_the_file(
    page: Page, context, entered, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = page.preset_picked("guided")
    monkeypatch.setattr("shared.ui.page.beside_transformer", lambda files: Path("model_lora.safetensors"))
    shown = page.preset_picked("guided")

    assert not visible(alone[page.settings.error_lora_strength])
    assert visible(shown[page.settings.lora_group])
    assert visible(shown[page.settings.error_lora_strength])
    list(page.draw(entered(error_lora_strength=0.5), THIS_PAGE))
    [(_, settings)] = context.session.orders
    assert settings.error_lora_strength == 0.5


# ---- drawing


def test_drawing_hands_the_order_to_the_session_and_remembers_the_model(page: Page, context, entered) -> None:
    list(page.draw(entered(prompt="a blue square", seed=9, num_inference_steps=2), THIS_PAGE))

    [(preset_id, settings)] = context.session.orders
    assert preset_id == "z_image_demo"
    assert (settings.prompt, settings.seed, settings.num_inference_steps) == ("a blue square", 9, 2)
    assert context.config["last_model_type"] == "z_image_demo"


def test_drawing_shows_words_steps_and_each_picture_as_it_is_done(page: Page, context, entered) -> None:
    shown = list(page.draw(entered(batch_size=2, num_inference_steps=2), THIS_PAGE))

    words = [update.get(page.result.status, "") for update in shown]
    assert "Loading the model" in words[0]
    assert "Picture 1 of 2 · step 1 of 2" in words[1]
    galleries = [update[page.result.gallery] for update in shown if page.result.gallery in update]
    assert [len(gallery) for gallery in galleries] == [1, 2]
    assert galleries[-1][1][1] == "seed 6"
    assert shown[-1][page.result.status] == ""
    assert visible(shown[-1][page.compose.generate])
    assert not visible(shown[-1][page.compose.cancel])


def test_a_wrong_size_is_a_message_with_the_nearest_two_and_nothing_is_drawn(page: Page, context, entered) -> None:
    [shown] = page.draw(entered(resolution="custom", width=500), THIS_PAGE)

    assert "500" in shown[page.result.status] and "496 and 512" in shown[page.result.status]
    assert visible(shown[page.compose.generate])
    assert context.session.orders == []


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        (RunError("The network is down.", "Try again later."), "Try again later."),
        (ValueError("bad shape"), "bad shape"),
    ],
)
def test_a_failure_on_the_way_is_a_message_and_the_next_picture_is_drawn(
    page: Page, context, entered, failure: Exception, said: str
) -> None:
    context.session.failure = failure
    failed = list(page.draw(entered(), THIS_PAGE))[-1]
    context.session.failure = None
    drawn = list(page.draw(entered(), THIS_PAGE))[-1]

    assert said in failed[page.result.status]
    assert "Traceback" not in failed[page.result.status]
    assert visible(failed[page.compose.generate])
    assert drawn[page.result.status] == ""


def test_a_configuration_that_cannot_be_written_does_not_stop_the_picture(page: Page, context, entered) -> None:
    def refuse(**changes: Any) -> None:
        raise RunError("wgp_config.json could not be written.")

    context.save_config = refuse

    assert list(page.draw(entered(), THIS_PAGE))[-1][page.result.status] == ""
    assert len(context.session.orders) == 1


def test_cancel_stops_the_page_that_is_drawing_and_no_other(page: Page, context, entered) -> None:
    drawing = page.draw(entered(), THIS_PAGE)
    next(drawing)

    page.cancelled(OTHER_PAGE)
    assert context.session.cancels == 0

    shown = page.cancelled(THIS_PAGE)
    assert context.session.cancels == 1
    assert "Cancelled" in shown[page.result.status]
    rest = list(drawing)
    assert [update for update in rest if page.result.gallery in update] == []
    assert rest[-1][page.result.status] == shown[page.result.status]  # whichever of the two arrives last


def test_a_page_that_is_closed_while_drawing_leaves_the_easel(page: Page, context, entered) -> None:
    drawing = page.draw(entered(), THIS_PAGE)
    next(drawing)
    assert page.easel.page == "this page"
    drawing.close()

    assert page.easel.page is None
    assert context.session.drawing == 0


def test_a_page_that_must_wait_is_told_so(page: Page, entered) -> None:
    assert "Starting" in page.asked(OTHER_PAGE)[page.result.status]

    drawing = page.draw(entered(), THIS_PAGE)
    next(drawing)

    assert "Waiting" in page.asked(OTHER_PAGE)[page.result.status]
    assert "Starting" in page.asked(THIS_PAGE)[page.result.status]  # its own last step ends first


# ---- seeds and restored settings


def test_the_seed_of_the_last_picture_can_be_used_again(page: Page, entered) -> None:
    seeds = next(u[page.result.seeds] for u in page.draw(entered(seed=31), THIS_PAGE) if page.result.seeds in u)

    assert page.seed_reused(seeds) == 31
    assert page.seed_reused([]) == gr.skip()


def test_a_picture_gives_back_the_settings_it_was_made_with(page: Page, context, entered) -> None:
    order = entered(preset="guided", prompt="a green star", resolution="512x768", guidance_scale=2.5, seed=77)
    list(page.draw(order, THIS_PAGE))
    [picture] = context.output_folder.glob("*.png")

    shown = page.settings_restored("z_image_demo", str(picture))

    assert shown[page.compose.preset]["value"] == "guided"
    assert shown[page.compose.prompt] == "a green star"
    assert shown[page.settings.resolution]["value"] == "512x768"
    assert shown[page.settings.guidance_scale]["value"] == 2.5
    assert shown[page.settings.seed] == 77


def test_a_picture_of_a_preset_that_is_not_here_keeps_the_chosen_one_and_says_so(page: Page, context, entered) -> None:
    list(page.draw(entered(preset="guided", resolution="512x768"), THIS_PAGE))
    [picture] = context.output_folder.glob("*.png")
    context.on_disk = [preset for preset in context.on_disk if preset.id != "guided"]
    context.refresh_presets()

    shown = page.settings_restored("z_image_demo", str(picture))

    assert shown[page.compose.preset]["value"] == "z_image_demo"
    assert "guided" in shown[page.result.status]


@pytest.mark.parametrize("kind", ["none", "plain", "text"])
def test_what_carries_no_settings_is_refused_in_words(page: Page, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "picture.png"
    if kind == "plain":
        Image.new("RGB", (16, 16)).save(path)
    elif kind == "text":
        path.write_text("not a picture")

    shown = page.settings_restored("z_image_demo", None if kind == "none" else str(path))

    assert 'role="alert"' in shown[page.result.status]
    assert list(shown) == [page.result.status]


def test_noise_and_prompt_settings_follow_the_preset_and_reach_the_order(page: Page, context, entered) -> None:
    context.saved["z_image_demo"] = {"schedule": "beta", "sigmas": [1, 0.5], "diversity": 0.5}
    parts = sampling_components(page.sampling)
    shown = page.preset_picked("z_image_demo")

    assert (shown[parts["schedule"]], shown[parts["sigmas"]], shown[parts["long_prompt"]]) == ("beta", "1, 0.5", "keep")

    changes = {"schedule": "linear", "sigmas": "1, 0.6, 0.3", "variation_strength": 0.2, "variation_seed": 4}
    filled = {parts[key]: value for key, value in changes.items()}
    _, settings = page._order(entered() | filled)

    assert (settings.sampling.schedule, settings.sampling.sigmas) == ("linear", (1, 0.6, 0.3))
    assert (settings.sampling.variation_strength, settings.sampling.variation_seed) == (0.2, 4)
    assert settings.num_inference_steps == 3
