"""How the page looks: quiet greys with a hint of warmth, one accent, and room around the picture; light and dark.

Fonts are the ones gradio ships, so nothing is fetched from elsewhere. Only Regular and Bold are used: the SemiBold
files in its package hold a few letters only, and the browser would fill the rest from another font.
"""

from __future__ import annotations

from urllib.parse import quote

import gradio as gr
from gradio.themes.utils import colors, fonts, sizes

_ACCENT = colors.Color(
    name="iris",
    c50="#f3f3fd", c100="#e7e7fb", c200="#d0d1f6", c300="#b0b2ee", c400="#8e90e4", c500="#6b6dd8",
    c600="#5557c5", c700="#4547a3", c800="#383a82", c900="#2e3068", c950="#1c1d42",
)  # fmt: skip
_GREY = colors.Color(
    name="stone",
    c50="#faf9f7", c100="#f3f2ef", c200="#e6e4e0", c300="#d3d0ca", c400="#a6a29b", c500="#6f6b64",
    c600="#5b5751", c700="#403d39", c800="#2a2826", c900="#1d1c1b", c950="#141413",
)  # fmt: skip


_ICON = (
    "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 32 32'><rect width='32' height='32' rx='8' fill='#5557c5'/>"
    "<path d='M9 9h14L9 23h14' fill='none' stroke='white' stroke-width='3.5' stroke-linejoin='round'"
    " stroke-linecap='round'/></svg>"
)
HEAD = f'<link rel="icon" type="image/svg+xml" href="data:image/svg+xml,{quote(_ICON)}">'


def build_theme() -> gr.themes.Base:
    """The page's theme: contrast of text is at least 4.5 : 1 in both modes."""
    theme = gr.themes.Base(
        primary_hue=_ACCENT,
        secondary_hue=_ACCENT,
        neutral_hue=_GREY,
        text_size=sizes.text_md,
        spacing_size=sizes.spacing_md,
        radius_size=sizes.radius_lg,
        font=[fonts.LocalFont("IBM Plex Sans", weights=(400, 700)), "system-ui", "sans-serif"],
        font_mono=[fonts.LocalFont("IBM Plex Mono", weights=(400,)), "ui-monospace", "monospace"],
    )
    return theme.set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950",
        body_text_color="*neutral_800",
        body_text_color_dark="*neutral_200",
        body_text_color_subdued="*neutral_500",
        body_text_color_subdued_dark="*neutral_400",
        background_fill_primary="white",
        background_fill_primary_dark="*neutral_900",
        background_fill_secondary="*neutral_100",
        background_fill_secondary_dark="*neutral_800",
        block_background_fill="white",
        block_background_fill_dark="*neutral_900",
        block_border_width="0px",
        block_border_width_dark="0px",
        block_shadow="none",
        block_shadow_dark="none",
        block_title_text_weight="700",
        block_title_text_size="*text_sm",
        block_title_text_color="*neutral_600",
        block_title_text_color_dark="*neutral_300",
        block_info_text_size="*text_sm",
        block_info_text_color="*neutral_500",
        block_info_text_color_dark="*neutral_400",
        input_background_fill="*neutral_50",
        input_background_fill_dark="*neutral_950",
        input_border_color="*neutral_200",
        input_border_color_dark="*neutral_700",
        input_border_color_focus="*primary_500",
        input_border_color_focus_dark="*primary_400",
        input_border_width="1px",
        input_shadow="none",
        input_shadow_focus="0 0 0 3px *primary_100",
        input_shadow_focus_dark="0 0 0 3px *primary_900",
        input_placeholder_color="*neutral_400",
        input_placeholder_color_dark="*neutral_500",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_hover_dark="*primary_700",
        button_primary_text_color="white",
        button_primary_text_color_dark="white",
        button_secondary_background_fill="*neutral_100",
        button_secondary_background_fill_dark="*neutral_800",
        button_secondary_background_fill_hover="*neutral_200",
        button_secondary_background_fill_hover_dark="*neutral_700",
        button_secondary_text_color="*neutral_700",
        button_secondary_text_color_dark="*neutral_200",
        button_cancel_background_fill="*neutral_200",
        button_cancel_background_fill_dark="*neutral_700",
        button_cancel_background_fill_hover="*neutral_300",
        button_cancel_background_fill_hover_dark="*neutral_600",
        button_cancel_text_color="*neutral_800",
        button_cancel_text_color_dark="*neutral_100",
        button_large_text_weight="700",
        slider_color="*primary_500",
        slider_color_dark="*primary_400",
        shadow_drop="none",
        shadow_drop_lg="0 12px 32px rgb(0 0 0 / 0.10)",
    )


CSS = """
.gradio-container { width: 100%; }
.gradio-container > .main { width: 100%; max-width: 1360px !important; margin: 0 auto;
                            padding: 20px 28px 40px !important; }

#masthead h1 { font-size: 22px; font-weight: 700; letter-spacing: -0.01em; margin: 0; }
.html-container { padding: 0 !important; }

/* Wide: what and how on the left, the picture on the right. Narrow: what, picture, how. */
#page { display: grid; gap: 16px 24px; align-items: start;
        grid-template-columns: minmax(340px, 400px) minmax(0, 1fr); grid-template-rows: auto 1fr;
        grid-template-areas: "compose result" "settings result"; }
#compose { grid-area: compose; }
#settings { grid-area: settings; }
#result { grid-area: result; position: sticky; top: 20px; }
#compose, #settings, #result { min-width: 0 !important; gap: 12px; }
#compose, #settings { background: var(--block-background-fill); border-radius: 16px; padding: 18px;
                      border: 1px solid var(--border-color-primary); }
#compose .form, #settings .form { border: 0; background: none; box-shadow: none; gap: 12px; overflow: visible; }
#compose .block, #settings .block { padding: 0; background: none; overflow: visible !important; }

/* Gradio draws the empty part of a slider in a light grey in both modes, and its handle white on white. */
.dark #page input[type=range] { --neutral-200: var(--neutral-700); }
#page input[type=range]::-webkit-slider-thumb { border: 1px solid var(--neutral-300); }
#page input[type=range]::-moz-range-thumb { border: 1px solid var(--neutral-300); }

#model-row, #seed-row { align-items: end; gap: 8px; flex-wrap: nowrap; }
#preset input, #resolution input { text-overflow: ellipsis; padding-right: 20px; }
#refresh { height: 40px; }
#random-seed, #reuse-seed { height: 42px; white-space: nowrap; }
#settings .form:has(> .hidden:only-child) { display: none; }
#loras, #advanced, #restore { border-top: 1px solid var(--border-color-primary) !important; border-radius: 0;
                              padding-top: 12px !important; }
#nag { gap: 12px; }
#restore .image-container, #restore .wrap { border-radius: 10px; }
#picture { border: 1px dashed var(--input-border-color); border-radius: 10px; }
#preset-note { margin-top: -4px; }
#preset-note p { margin: 0 0 2px; font-size: 13px; line-height: 1.45; color: var(--body-text-color-subdued); }
#preset-note p.fetch { color: var(--body-text-color); }
#preset-note p.problem { color: var(--status-failure); }
#preset-note:not(:has(p)), #status:not(:has(.status)), #info:not(:has(p)) { display: none; }

:root { --status-failure: #7c2415; --status-failure-fill: #fdf1ef; --status-failure-line: #f0c4bc; }
.dark { --status-failure: #f4b9ad; --status-failure-fill: #2c1714; --status-failure-line: #6b2f24; }
/* Gradio's own progress overlay says "Error" (unseen, but read aloud) for a run that was cancelled. */
#result [data-testid=status-tracker] { display: none; }
.status { border-radius: 12px; padding: 12px 16px; font-size: 15px; line-height: 1.45;
          background: var(--block-background-fill); border: 1px solid var(--border-color-primary); }
.status .words { display: flex; justify-content: space-between; gap: 4px 16px; flex-wrap: wrap; margin-bottom: 10px; }
.status .remark { color: var(--body-text-color-subdued); font-variant-numeric: tabular-nums; }
.status .bar { height: 6px; border-radius: 3px; overflow: hidden; background: var(--background-fill-secondary); }
.status .bar > div { height: 100%; border-radius: 3px; background: var(--slider-color); }
.status .bar.unknown > div { width: 30%; animation: drift 1.6s ease-in-out infinite alternate; }
@keyframes drift { from { margin-left: 0; } to { margin-left: 70%; } }
@media (prefers-reduced-motion: reduce) { .status .bar.unknown > div { animation: none; width: 100%; opacity: .5; } }
.status.failure { background: var(--status-failure-fill); border-color: var(--status-failure-line); }
.status.failure p { margin: 0; color: var(--status-failure); }
.status.failure .what { font-weight: 700; }

#gallery { background: var(--block-background-fill); border: 1px solid var(--border-color-primary);
           border-radius: 16px; min-height: min(64vh, 600px); transition: opacity .2s; }
/* Whole pictures instead of square cut-outs in a box that scrolls. */
#gallery .grid-wrap { min-height: 0; max-height: none; overflow: visible; padding: 10px; }
#gallery .thumbnail-lg { aspect-ratio: auto; border: 0; background: none; box-shadow: none; }
#gallery .thumbnail-lg > img { height: auto; max-height: min(74vh, 760px); border-radius: 8px; }
#gallery .gallery-item:only-child img { width: auto; height: min(74vh, 640px); max-width: 100%; margin: 0 auto; }
#gallery .preview::before { background: var(--block-background-fill); opacity: 1; }
#gallery .empty { min-height: inherit; display: flex; flex-direction: column; gap: 10px; }
#gallery .empty::after { content: "Your pictures appear here"; color: var(--body-text-color-subdued); font-size: 14px; }
#result:has(.status.working) #gallery { opacity: .55; }
#info { padding: 0 4px; }
#info p { margin: 0; font-size: 14px; color: var(--body-text-color-subdued); }
#info p.facts { color: var(--body-text-color); font-variant-numeric: tabular-nums; }
#info code { overflow-wrap: anywhere; font-size: 12.5px; background: none; padding: 0; border: 0; }

@media (max-width: 860px) {
  .gradio-container > .main { padding: 12px 12px 32px !important; }
  #page { grid-template-columns: minmax(0, 1fr); grid-template-rows: none; gap: 14px;
          grid-template-areas: "compose" "result" "settings"; }
  #compose, #settings { padding: 14px; }
  #result { position: static; }
  #result #gallery { min-height: 300px; }
  #gallery .gallery-item:only-child img { width: 100%; height: auto; }
}
"""
