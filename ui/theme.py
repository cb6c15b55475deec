"""The page's colours, type and spacing; ui/static/page.css has what a Gradio theme cannot say.

The idea is ink on paper: what a person does is dark, what a model writes is blue. All pairs of text
and background have the contrast that WCAG 2.2 AA asks for (4.5 for text, 3 for controls).
"""
import gradio as gr

INK = gr.themes.Color("#f0f4ff", "#e3eaff", "#c9d6ff", "#9fb5ff", "#7b96fa", "#4a68e8", "#2f4fd0",
                      "#263fa8", "#21367f", "#1c2d62", "#141f42", name="ink")
PAPER = gr.themes.Color("#faf9f7", "#f3f1ed", "#e5e2dc", "#cfcbc4", "#a3a09a", "#777570", "#5c5a57",
                        "#413f3d", "#2a2928", "#1d1c1c", "#141414", name="paper")

THEME = gr.themes.Base(
    primary_hue=INK,
    secondary_hue=INK,
    neutral_hue=PAPER,
    radius_size=gr.themes.sizes.radius_lg,
    # IBM Plex comes with Gradio, so the browser asks no other server for it
    font=[gr.themes.LocalFont("IBM Plex Sans", weights=(400, 700)), "system-ui", "sans-serif"],
    font_mono=[gr.themes.LocalFont("IBM Plex Mono", weights=(400, 700)), "ui-monospace",
               "monospace"],
).set(
    # paper and text
    body_background_fill="*neutral_50",
    body_text_color="*neutral_900",
    body_text_color_subdued="*neutral_600",
    body_text_color_subdued_dark="*neutral_300",
    link_text_color_dark="*primary_300",
    # no frames: a label, then its control
    block_background_fill="transparent",
    block_background_fill_dark="transparent",
    block_border_width="0px",
    block_padding="0px",
    block_info_text_size="13px",
    block_title_text_color="*body_text_color",
    block_title_text_color_dark="*body_text_color",
    block_title_text_weight="600",
    block_label_text_color="*body_text_color",
    block_label_text_color_dark="*body_text_color",
    block_label_background_fill="*body_background_fill",
    block_label_background_fill_dark="*body_background_fill",
    block_label_border_width="0px",
    layout_gap="20px",
    form_gap_width="20px",
    # controls
    input_background_fill="white",
    input_background_fill_dark="*neutral_900",
    input_border_width="1px",
    input_border_color="*neutral_300",
    input_border_color_focus="*primary_500",
    input_border_color_focus_dark="*primary_400",
    input_placeholder_color="*neutral_500",
    input_placeholder_color_dark="*neutral_400",
    checkbox_border_color="*neutral_500",
    checkbox_border_color_dark="*neutral_400",
    slider_color_dark="*primary_400",
    # buttons: one filled with ink, the others outlined
    button_large_text_size="*text_md",
    button_large_text_weight="400",
    button_primary_background_fill="*primary_600",
    button_primary_background_fill_hover="*primary_700",
    button_primary_background_fill_dark="*primary_500",
    button_primary_background_fill_hover_dark="*primary_600",
    button_primary_border_color="transparent",
    button_secondary_background_fill="transparent",
    button_secondary_background_fill_dark="transparent",
    button_secondary_background_fill_hover="*neutral_100",
    button_secondary_background_fill_hover_dark="*neutral_800",
    button_secondary_border_color="*neutral_300",
    button_cancel_border_color="#b42318",
    button_cancel_border_color_dark="#ff9d92",
    button_cancel_text_color="#b42318",
    button_cancel_text_color_dark="#ff9d92",
)
