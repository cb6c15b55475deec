"""The About tab: the card of each model (its data, results and licence), and how to open others."""
import functools
import json
import re
from pathlib import Path

import gradio as gr

import publish
import report
from ui.models import Models, show_user_errors

ABOUT = Path(__file__).parent.parent / "assets" / "about.md"


def build(models: Models):
    """Lays out the tab and connects its events."""
    with gr.Row():
        with gr.Column(scale=3, min_width=320):
            model = gr.Dropdown(
                models.names, value=models.names[0], label="Model", elem_id="about-model")
            text = gr.Markdown(elem_id="about-card")
        with gr.Column(scale=2, min_width=320):
            gr.Markdown(ABOUT.read_text(encoding="utf-8"))
    opened = gr.context.Context.root_block.load
    gr.on([opened, model.change], functools.partial(card, models), model, text,
          api_visibility="private", show_progress="hidden", trigger_mode="always_last")


def card(models: Models, name: str) -> str:
    """The model's card as Markdown: the README of its folder, or else the one that publish.py would
    write. Its metadata, the model's figures and its recipe follow the text."""
    with show_user_errors():
        engine, info = models.engine(name), models.info(name)
    readme = Path(info["path"]) / "README.md"
    run = publish.source_run(info)
    if run:
        info = {**info, "train_config": report.read_config(run)}
    has_readme = readme.is_file()
    if has_readme:
        text = readme.read_text(encoding="utf-8")
    else:
        text = publish.model_card(engine.model, engine.tokenizer, info, run, name)

    # take the metadata, which is YAML between two lines of ---, off the text
    metadata = ""
    if text.startswith("---\n"):
        _, metadata, text = text.split("---\n", 2)
    facts = re.findall(r"^(license|language|datasets): *(\S.*)$", metadata, re.MULTILINE)
    facts_line = " · ".join(f"{key}: {value}" for key, value in facts)

    # a card that publish.py writes contains the recipe already
    recipe = info.get("train_config")
    recipe_block = ""
    if recipe and has_readme:
        recipe_block = f"```json\n{json.dumps(recipe, indent=1)}\n```"
    return "\n\n".join([clean(text), facts_line, models.describe(name), recipe_block])


def clean(markdown: str) -> str:
    """Removes comments and images (the plots are under Training), and disables HTML tags."""
    comment_or_image = r"<!--.*?-->|^!\[.*?\]\(.*?\)$"
    markdown = re.sub(comment_or_image, "", markdown, flags=re.DOTALL | re.MULTILINE)
    lines = []
    for line in markdown.strip().splitlines():
        is_code = line.startswith("    ")  # Markdown shows it as it is
        lines.append(line if is_code else re.sub(r"<(?=[a-zA-Z/])", "&lt;", line))
    return "\n".join(lines)
