"""One small picture, drawn to see whether drawing works."""

from __future__ import annotations

import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from shared.app.context import DEFAULT_PRESET
from shared.app.doctor.report import SelfTest
from shared.quant.errors import UserError

if TYPE_CHECKING:
    from shared.app.context import AppContext

SELF_TEST_SIZE = "256x256"
SELF_TEST_SEED = 1


def draw_self_test(ctx: AppContext) -> SelfTest:
    """Draw one small picture with the weights that come with the program, into a temporary folder."""
    started = time.monotonic()

    def outcome(words: str, *, passed: bool = False) -> SelfTest:
        return SelfTest(passed=passed, seconds=round(time.monotonic() - started, 2), words=words)

    try:
        return outcome(_draw(ctx), passed=True)
    except UserError as error:
        return outcome(str(error))
    # Whatever fails here is what the test was to find out: it belongs into the report, not above it.
    except Exception as error:  # noqa: BLE001
        return outcome(f"{type(error).__name__}: {error}")
    finally:
        ctx.session.release()


def _draw(ctx: AppContext) -> str:
    """What was drawn, in words. Raises UserError, or whatever the libraries raise, when it cannot be."""
    from PIL import Image

    from shared.app.settings import GenerationSettings
    from shared.quant.errors import RunError

    preset = ctx.presets.get(DEFAULT_PRESET)
    wishes = {"resolution": SELF_TEST_SIZE, "seed": SELF_TEST_SEED, "batch_size": 1}
    settings = GenerationSettings.build(preset, {}, wishes)
    with TemporaryDirectory() as folder:
        # The session itself refuses a picture that holds NaN or infinity.
        result = ctx.session.generate(preset, settings, output=Path(folder) / "self_test.png")
        with Image.open(result.images[0].path) as picture:
            size = picture.size
            ranges: Any = picture.convert("RGB").getextrema()  # (least, most) of each colour
    if all(low == high for low, high in ranges):
        raise RunError(f"The picture has one colour only, {[low for low, _ in ranges]}.", "Its weights are damaged.")
    seconds = ", ".join(f"{stage} {spent:.1f} s" for stage, spent in result.seconds.items())
    return f"{preset.id}, {size[0]}x{size[1]}, {result.forwards} steps, all pixels finite ({seconds})"
