"""The page in a real, headless Chromium: what a person sees and does, with a session that draws plain pictures."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from shared.app.context import AppContext
from shared.app.metadata import read_record
from shared.quant.errors import RunError
from shared.ui.app import serve
from tests.shared.ui.conftest import FakeContext

pytestmark = pytest.mark.browser

LOOPBACK = "127.0.0.1"
LORA = min(Path("lora_root/z_image/demo").glob("*.safetensors"))  # whichever styles come with the program
PATIENCE = 45_000  # ms; a loaded two-core machine is slow to paint
WITH_TORCH = 300_000  # ms; the first picture of a process imports torch and loads the demo
CHROMIUM_FLAGS = (  # no sandbox: CI runs as root. The rest keeps the browser itself off the network.
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
)  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return probe.getsockname()[1]


def find_chromium() -> str:
    named = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if named and Path(named).exists():
        return named
    reason = "no Chromium here; install it (Debian: apt-get install chromium) or name it in CHROMIUM"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    executable = find_chromium()
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=executable, args=list(CHROMIUM_FLAGS))
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[FakeContext, str]]:
    """One server for all tests, with its address: starting it is the slow part."""
    context = FakeContext(tmp_path_factory.mktemp("page"))
    app = serve(context, LOOPBACK, free_port())
    yield context, app.local_url
    app.close(verbose=False)


@pytest.fixture
def context(served: tuple[FakeContext, str]) -> Iterator[FakeContext]:
    served_context = served[0]
    served_context.start_over()
    yield served_context
    if served_context.session.gate is not None:  # let a drawing that a test left behind come to its end
        served_context.session.gate.release(1000)


@dataclass(frozen=True)
class Program:
    """The program itself behind the page: its address, and the folders of its LoRAs and its pictures."""

    address: str
    loras: Path
    outputs: Path

    def newest(self) -> tuple[Image.Image, dict[str, Any]]:
        """The picture drawn last and its record."""
        path = max((p for p in self.outputs.iterdir() if p.is_file()), key=lambda p: p.stat().st_mtime_ns)
        record = read_record(path)
        assert record is not None
        with Image.open(path) as picture:
            return picture.copy(), record


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    """One for all tests that draw with the demo: loading it is the slow part."""
    folder = tmp_path_factory.mktemp("program")
    loras = folder / "my loras"
    loras.mkdir()
    folders = {"config": str(folder), "settings": str(folder), "output_dir": str(folder / "outputs")}
    context = AppContext.create(argparse.Namespace(**folders, lora_dir_z_image=str(loras)))
    app = serve(context, LOOPBACK, free_port())
    yield Program(app.local_url, loras, folder / "outputs")
    app.close(verbose=False)


@pytest.fixture
def demo_page(browser: Browser, program: Program) -> Iterator[Callable[[], Page]]:
    """Open a page of the program with the demo chosen, two steps and seed 7."""
    pages: list[Page] = []

    def open_one() -> Page:
        page = browser.new_page(viewport={"width": 1440, "height": 1400})
        pages.append(page)
        page.goto(program.address)
        expect(page.locator("#preset input")).to_have_value(re.compile("Demo"), timeout=PATIENCE)
        type_number(page, "steps", 2)
        type_number(page, "seed", 7)
        return page

    yield open_one
    for page in pages:
        page.close()


@pytest.fixture
def open_page(browser: Browser, served: tuple[FakeContext, str], context) -> Iterator[Callable[..., Page]]:
    """Open the page and wait until its form is filled. Whatever it asks from elsewhere or logs as an error fails."""
    address = served[1]
    complaints: list[str] = []
    pages: list[Page] = []

    def open_one(*, width: int = 1440, height: int = 900, scheme: str = "light") -> Page:
        page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
        page.set_default_timeout(PATIENCE)
        pages.append(page)
        page.on("request", lambda request: complaints.append(request.url) if is_outside(request.url) else None)
        page.on("console", lambda line: complaints.append(line.text) if line.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(address)
        expect(page.locator("#prompt textarea")).to_have_value("a red circle", timeout=PATIENCE)
        return page

    def is_outside(url: str) -> bool:
        return not url.startswith((address, "data:", "blob:"))

    yield open_one
    for page in pages:
        page.close()
    assert complaints == []


def status(page: Page):
    return page.locator("#status .status")


def generate(page: Page):
    return page.locator("button#generate")


def cancel(page: Page):
    return page.locator("button#cancel")


def pictures(page: Page):
    return page.locator("#gallery .thumbnail-lg img")


def hold(context) -> threading.Semaphore:
    context.session.gate = threading.Semaphore(0)
    return context.session.gate


def type_number(page: Page, field: str, value: float) -> None:
    box = page.locator(f"#{field} input[type=number]")
    box.fill(str(value))
    box.press("Tab")


@pytest.mark.parametrize("width", [390, 1440])
def test_the_demo_is_ready_to_draw_and_fits_the_screen(open_page, width: int) -> None:
    page = open_page(width=width)

    expect(page.locator("#preset input")).to_have_value("Fake · Demo")
    expect(generate(page)).to_be_visible()
    expect(cancel(page)).to_be_hidden()
    expect(page.locator("#guidance")).to_be_hidden()
    expect(page.locator("#negative-prompt")).to_be_hidden()
    assert page.evaluate("document.documentElement.scrollWidth") == width


def test_on_a_phone_the_picture_stands_right_below_the_button(open_page) -> None:
    page = open_page(width=390, height=844)
    top = {name: page.locator(f"#{name}").bounding_box()["y"] for name in ("compose", "result", "settings")}

    assert top["compose"] < top["result"] < top["settings"]


def test_generate_shows_each_step_and_then_the_picture_and_where_it_is(open_page, context) -> None:
    gate = hold(context)
    page = open_page()
    type_number(page, "seed", 42)
    generate(page).click()
    expect(status(page)).to_contain_text("Loading the model")
    expect(cancel(page)).to_be_visible()
    gate.release()
    expect(status(page)).to_contain_text("Step 1 of 4")
    expect(status(page)).to_contain_text("about 3.0 s left")
    gate.release(3)

    expect(pictures(page)).to_have_count(1)
    expect(generate(page)).to_be_visible()
    expect(status(page)).to_have_count(0)
    expect(page.locator("#info")).to_contain_text("256 × 256 · seed 42")
    expect(page.locator("#info code")).to_have_text(str(context.output_folder / "1_1.png"))


def test_the_picture_that_the_page_hands_out_still_carries_its_settings(open_page, context, tmp_path: Path) -> None:
    page = open_page()
    type_number(page, "seed", 42)
    generate(page).click()
    expect(pictures(page)).to_have_count(1)
    body = page.request.get(pictures(page).get_attribute("src")).body()
    (tmp_path / "downloaded.png").write_bytes(body)

    assert read_record(tmp_path / "downloaded.png")["seed"] == 42


def test_pictures_of_a_batch_appear_one_by_one(open_page, context) -> None:
    gate = hold(context)
    page = open_page()
    type_number(page, "batch-size", 3)
    generate(page).click()
    gate.release(5)

    expect(pictures(page)).to_have_count(1)
    expect(status(page)).to_contain_text("Picture 2 of 3 · step 1 of 4")
    gate.release(20)
    expect(pictures(page)).to_have_count(3)


def test_cancel_stops_within_one_step_keeps_what_is_done_and_the_next_picture_is_drawn(open_page, context) -> None:
    gate = hold(context)
    page = open_page()
    type_number(page, "batch-size", 2)
    generate(page).click()
    gate.release(6)
    expect(status(page)).to_contain_text("Picture 2 of 2 · step 2 of 4")
    cancel(page).click()
    expect(status(page)).to_contain_text("Cancelled")
    gate.release()  # the step that was being computed
    expect(pictures(page)).to_have_count(1)
    expect(generate(page)).to_be_visible()

    type_number(page, "batch-size", 1)
    generate(page).click()
    gate.release(4)
    expect(page.locator("#info code")).to_have_text(str(context.output_folder / "2_1.png"))
    assert context.session.drawing == 0
    assert not (context.output_folder / "1_2.png").exists()


def test_a_second_page_waits_for_the_first_and_then_draws(open_page, context) -> None:
    gate = hold(context)
    first, second = open_page(), open_page()
    generate(first).click()
    expect(status(first)).to_contain_text("Loading the model")
    generate(second).click()
    expect(status(second)).to_contain_text("Waiting for another page's pictures")
    gate.release(8)

    expect(pictures(first)).to_have_count(1)
    expect(pictures(second)).to_have_count(1)
    assert context.session.most_at_once == 1


def test_a_waiting_page_that_cancels_does_not_disturb_the_other(open_page, context) -> None:
    gate = hold(context)
    first, second = open_page(), open_page()
    generate(first).click()
    expect(status(first)).to_contain_text("Loading the model")
    generate(second).click()
    expect(status(second)).to_contain_text("Waiting")
    cancel(second).click()
    expect(status(second)).to_contain_text("Cancelled")
    gate.release(4)

    expect(pictures(first)).to_have_count(1)
    expect(generate(first)).to_be_visible()
    assert len(context.session.orders) == 1
    assert context.session.cancels == 0


def test_a_page_that_is_closed_while_drawing_does_not_hold_up_the_next(open_page, context) -> None:
    gate = hold(context)
    leaving = open_page()
    generate(leaving).click()
    expect(status(leaving)).to_contain_text("Loading the model")
    leaving.close()
    staying = open_page()
    generate(staying).click()
    gate.release(8)

    expect(pictures(staying)).to_have_count(1)


def test_an_error_is_a_message_and_the_page_stays_usable(open_page, context) -> None:
    page = open_page()
    context.session.failure = RunError("The network is down.", "Try again later.")
    generate(page).click()
    expect(page.get_by_role("alert")).to_contain_text("The network is down.")
    expect(page.get_by_role("alert")).to_contain_text("Try again later.")
    context.session.failure = None
    generate(page).click()

    expect(pictures(page)).to_have_count(1)
    expect(page.get_by_role("alert")).to_have_count(0)


def test_a_size_the_model_cannot_draw_names_the_nearest_two(open_page) -> None:
    page = open_page()
    page.locator("#resolution input").click()
    page.get_by_role("option", name="Custom size").click()
    type_number(page, "width", 500)
    generate(page).click()

    expect(page.get_by_role("alert")).to_contain_text("496 and 512")


def test_picking_another_model_shows_its_fields_and_defaults(open_page) -> None:
    page = open_page()
    page.locator("#preset input").click()
    page.get_by_role("option", name="Guided").click()

    expect(page.locator("#guidance input[type=number]")).to_have_value("4")
    expect(page.locator("#steps input[type=number]")).to_have_value("30")
    expect(page.locator("#resolution input")).to_have_value("512 × 768 · portrait 2:3")
    expect(page.locator("#negative-prompt")).to_be_visible()
    expect(page.locator("#prompt textarea")).to_have_value("a red circle")


def test_a_preset_that_is_dropped_in_appears_after_refresh(open_page, context, preset_of) -> None:
    page = open_page()
    context.on_disk.append(preset_of(id="new", name="Brand new"))
    page.locator("#refresh").click()
    page.locator("#preset input").click()

    expect(page.get_by_role("option", name="Brand new")).to_be_visible()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # gradio leaves the upload open
def test_a_pictures_settings_come_back_from_the_picture(open_page, context) -> None:
    page = open_page()
    page.locator("#prompt textarea").fill("a green star")
    type_number(page, "seed", 77)
    generate(page).click()
    expect(pictures(page)).to_have_count(1)

    other = open_page()
    other.locator("#restore").get_by_role("button").first.click()
    other.locator("#picture input[type=file]").set_input_files(context.output_folder / "1_1.png")
    expect(other.locator("#picture img")).to_be_visible()
    other.locator("#use-settings").click()

    expect(other.locator("#prompt textarea")).to_have_value("a green star")
    expect(other.locator("#seed input")).to_have_value("77")


def test_the_last_seed_can_be_used_again(open_page) -> None:
    page = open_page()
    generate(page).click()
    expect(pictures(page)).to_have_count(1)
    drawn = page.locator("#info .facts").inner_text().rsplit(" ", 1)[1]
    page.locator("#reuse-seed").click()

    expect(page.locator("#seed input")).to_have_value(drawn)
    page.locator("#random-seed").click()
    expect(page.locator("#seed input")).to_have_value("-1")


def test_the_demo_that_comes_with_the_program_is_drawn_and_changed_by_a_lora(
    demo_page: Callable[[], Page], program: Program
) -> None:
    page = demo_page()
    generate(page).click()
    expect(page.locator("#info .facts")).to_contain_text("256 × 256 · seed 7", timeout=WITH_TORCH)
    plain, record = program.newest()
    assert record["model_type"] == "z_image_demo"

    shutil.copy(LORA, program.loras / "style.safetensors")
    page.locator("#refresh").click()
    page.locator("#loras > button").first.click()
    page.locator("#lora-files input").click()
    page.get_by_role("option", name="style.safetensors").click()
    page.locator("#lora-strengths textarea").fill("0.8")
    type_number(page, "steps", 2)
    type_number(page, "seed", 8)
    generate(page).click()
    expect(page.locator("#info .facts")).to_contain_text("seed 8", timeout=WITH_TORCH)

    changed, record = program.newest()
    assert (record["activated_loras"], record["loras_multipliers"]) == (["style.safetensors"], "0.8")
    [match] = record["provenance"]["loras"]
    assert match["matched"] == match["total"] > 0
    assert np.abs(np.asarray(changed, int) - np.asarray(plain)).mean() > 5  # of 255: a style, not a rounding


def test_a_picture_is_extended_enlarged_tile_by_tile_and_drawn_twice(
    demo_page: Callable[[], Page], program: Program, tmp_path: Path
) -> None:
    given = np.full((256, 256, 3), (240, 240, 235), np.uint8)
    given[96:160, 96:160] = (212, 38, 44)
    Image.fromarray(given).save(tmp_path / "given.png")
    page = demo_page()
    page.locator("#edit > button").first.click()
    expect(page.locator("#editor canvas").first).to_be_visible(timeout=PATIENCE)
    page.wait_for_timeout(2000)  # a picture given before Gradio's editor is ready breaks it for good
    page.locator("#editor input[type=file]").first.set_input_files(tmp_path / "given.png")
    page.wait_for_timeout(1000)

    def drawn(seed: int) -> tuple[np.ndarray, dict[str, Any]]:
        type_number(page, "seed", seed)
        generate(page).click()
        expect(page.locator("#info .facts")).to_contain_text(f"seed {seed}", timeout=WITH_TORCH)
        picture, record = program.newest()
        return np.asarray(picture), record

    page.locator("#outpaint textarea, #outpaint input").first.fill("right=64")
    wider, record = drawn(21)
    assert (wider.shape[:2], record["outpaint"]) == ((256, 320), "right=64")
    assert np.array_equal(wider[:, :240], given[:, :240])

    page.locator("#outpaint textarea, #outpaint input").first.fill("")
    type_number(page, "tile-scale", 1.5)
    larger, record = drawn(22)
    assert (larger.shape[:2], record["tile_scale"]) == ((384, 384), 1.5)
    assert record["provenance"]["forwards"] == 4 * 2  # four tiles, two steps each

    type_number(page, "tile-scale", 1)
    page.locator("#hires > button").first.click()
    type_number(page, "hires-scale", 1.5)
    twice, record = drawn(23)
    assert (twice.shape[:2], record["hires_scale"]) == ((384, 384), 1.5)


def test_reference_pictures_are_asked_of_models_that_look_at_them(
    open_page, context, preset_of, tmp_path: Path
) -> None:
    context.on_disk.append(preset_of(id="omni", name="Omni", model_def={"image_ref_choices": {"choices": []}}))
    for name in ("a.png", "b.png"):
        Image.new("RGB", (40, 30), "teal").save(tmp_path / name)
    page = open_page(height=1400)
    expect(page.locator("#references")).to_be_hidden()
    page.locator("#refresh").click()
    page.locator("#preset input").click()
    page.get_by_role("option", name="Omni").click()
    page.locator("#references > button").first.click()
    page.locator("#image-refs input[type=file]").first.set_input_files([tmp_path / "a.png", tmp_path / "b.png"])
    expect(page.locator("#image-refs img")).to_have_count(2, timeout=PATIENCE)
    generate(page).click()
    expect(pictures(page)).to_have_count(1)

    given = context.session.orders[-1][1].edit.image_refs
    assert [Path(path).read_bytes() for path in given] == [
        (tmp_path / name).read_bytes() for name in ("a.png", "b.png")
    ]


CONTRAST = """
(selector) => {
  const luminance = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const channels = (color) => color.match(/[\\d.]+/g).map(Number);
  const element = document.querySelector(selector);
  let ground = element;
  while (channels(getComputedStyle(ground).backgroundColor)[3] === 0) ground = ground.parentElement;
  const [a, b] = [getComputedStyle(element).color, getComputedStyle(ground).backgroundColor]
    .map((color) => luminance(channels(color).slice(0, 3)) + 0.05);
  return Math.max(a, b) / Math.min(a, b);
}
"""
READABLE = 4.5  # WCAG 2.2, 1.4.3: contrast of text of normal size


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_in_light_and_dark(open_page, scheme: str) -> None:
    page = open_page(scheme=scheme)
    generate(page).click()
    expect(pictures(page)).to_have_count(1)
    texts = ("#masthead h1", "#prompt textarea", "#prompt-label, #prompt span", "#preset-note p", "#generate",
             "#info .facts", "#info p + p", "#seed input", "#random-seed")  # fmt: skip
    contrasts = {text: page.evaluate(CONTRAST, text) for text in texts}

    assert min(contrasts.values()) >= READABLE, contrasts


def test_a_painted_picture_is_ordered_with_its_mask(open_page, context, tmp_path: Path) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (200, 300, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "given.png")
    page = open_page(height=1400)

    page.locator("#edit > button").first.click()
    expect(page.locator("#editor canvas").first).to_be_visible(timeout=PATIENCE)
    page.wait_for_timeout(2000)  # a picture given before Gradio's editor is ready breaks it for good
    page.locator("#editor input[type=file]").first.set_input_files(tmp_path / "given.png")
    for drawn in range(1, 8):  # strokes count once the picture has settled, and nothing on the page tells when
        page.wait_for_timeout(1000)
        canvas = page.locator("#editor canvas").first.bounding_box()
        middle, height = canvas["x"] + canvas["width"] / 2, canvas["y"] + canvas["height"] / 2
        page.mouse.move(middle - 30, height)
        page.mouse.down()
        page.mouse.move(middle + 30, height, steps=8)
        page.mouse.up()
        generate(page).click()
        expect(page.locator("#info")).to_contain_text(f"{drawn}_1.png", timeout=4 * PATIENCE)
        edit = context.session.orders[-1][1].edit
        if edit.image_mask:
            break

    with Image.open(edit.image_start) as start, Image.open(edit.image_mask) as mask:
        assert np.array_equal(np.asarray(start), pixels)
        painted = np.asarray(mask) > 0
    assert painted[100, 150]
    assert 0.01 < painted.mean() < 0.5
