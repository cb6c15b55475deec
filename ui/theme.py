"""The page's colours, type and spacing.

The idea is ink on paper: what a person does is dark, what a model writes is blue. All pairs of text
and background have the contrast that WCAG 2.2 AA asks for (4.5 for text, 3 for controls).

ui/static/theme.json sets variables of Gradio's themes, in groups: paper and text; blocks, which
have no frames; controls; buttons, of which one is filled with ink and the others are outlined.
ui/static/page.css has what a theme cannot say.
"""
from pathlib import Path

import gradio as gr

from common.files import read_json

INK = gr.themes.Color("#f0f4ff", "#e3eaff", "#c9d6ff", "#9fb5ff", "#7b96fa", "#4a68e8", "#2f4fd0",
                      "#263fa8", "#21367f", "#1c2d62", "#141f42", name="ink")
PAPER = gr.themes.Color("#faf9f7", "#f3f1ed", "#e5e2dc", "#cfcbc4", "#a3a09a", "#777570", "#5c5a57",
                        "#413f3d", "#2a2928", "#1d1c1c", "#141414", name="paper")
# IBM Plex comes with Gradio, so the browser asks no other server for it
SANS, MONO = (gr.themes.LocalFont(f"IBM Plex {kind}", weights=(400, 700))
              for kind in ("Sans", "Mono"))

THEME = gr.themes.Base(
    primary_hue=INK, secondary_hue=INK, neutral_hue=PAPER, radius_size=gr.themes.sizes.radius_lg,
    font=[SANS, "system-ui", "sans-serif"], font_mono=[MONO, "ui-monospace", "monospace"],
).set(**read_json(Path(__file__).parent / "static" / "theme.json"))
