"""The About tab: the card of each model, with what it learned, how well, under which licence; and how to show others here."""
import functools
import json
import re
from pathlib import Path

import gradio as gr

import publish
import report
from ui.models import Models, sentences

HERE = Path(__file__).parent.parent / "assets" / "about.md"


def build(models: Models):
    """Lays the tab out."""
    with gr.Row():
        with gr.Column(scale=3, min_width=320):
            model = gr.Dropdown(models.names, value=models.names[0], label="Model", elem_id="about-model")
            text = gr.Markdown(elem_id="about-card")
        with gr.Column(scale=2, min_width=320):
            gr.Markdown(HERE.read_text(encoding="utf-8"))
    gr.on([gr.context.Context.root_block.load, model.change], functools.partial(card, models), model, text,
          api_visibility="private", show_progress="hidden")


def card(models: Models, name: str) -> str:
    """A model's card as Markdown: the README of its folder, or what publish.py would write of it, with the metadata as a list."""
    with sentences():
        engine, info = models.engine(name), models.info(name)
    readme, run = Path(info["path"]) / "README.md", publish.run_of(info)
    if run:
        info = {**info, "train_config": report.read_config(run)}
    text = readme.read_text(encoding="utf-8") if readme.is_file() else publish.card(
        engine.model, engine.tokenizer, info, run, name)
    _, metadata, body = text.split("---\n", 2) if text.startswith("---\n") else ("", "", text)
    facts = re.findall(r"^(license|language|datasets): *(\S.*)$", metadata, re.MULTILINE)
    body = re.sub(r"<!--.*?-->|^!\[.*?\]\(.*?\)$", "", body, flags=re.DOTALL | re.MULTILINE)  # plots are under Training
    body = re.sub(r"^(?! {4})(.*)", lambda line: re.sub(r"<(?=[a-zA-Z/])", "&lt;", line[1]), body, flags=re.MULTILINE)  # no HTML
    recipe = info.get("train_config")
    return "\n\n".join([body.strip(), " · ".join(f"{key}: {value}" for key, value in facts), models.describe(name),
                        f"```json\n{json.dumps(recipe, indent=1)}\n```" if recipe and readme.is_file() else ""])
