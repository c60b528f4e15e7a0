"""What the panel says of settings that cost quality."""

from __future__ import annotations

import gradio as gr

from shared.app.schema import SETTING_KEYS
from shared.ui.sampling_panel import build_sampling_panel


def test_the_step_cache_is_off_and_called_lossy() -> None:
    with gr.Blocks():
        panel = build_sampling_panel()

    assert panel.step_cache.value == 0
    assert "lossy" in str(panel.step_cache.label)
    assert SETTING_KEYS["step_cache"].meaning.startswith("LOSSY")
