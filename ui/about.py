"""The About tab: what this page is, and the card of each model: its data, results and licence."""
import re
from pathlib import Path
from types import MethodType

import gradio as gr

import publish
from ui.models import Models
from ui.settings import ASSETS, QUIET


def build(models: Models):
    """Lays out the tab and connects its events."""
    with gr.Row():
        with gr.Column(scale=2):
            gr.Markdown((ASSETS / "about.md").read_text(encoding="utf-8"))
        with gr.Column(scale=3):
            model = gr.Dropdown(
                models.names, value=models.default, label="Model", elem_id="about-model")
            summary = gr.Markdown(elem_id="about-card")
            with gr.Accordion("How it was made, results, samples and sources", open=False,
                              elem_id="about-more"):
                details = gr.Markdown(elem_id="about-details")
            with gr.Accordion("Settings of the training, as JSON", open=False) as recipe_fold:
                recipe = gr.JSON(show_label=False)
    # without triggers: when the page opens, and when the input changes
    gr.on(fn=MethodType(card, models), inputs=model,
          outputs=[summary, details, recipe_fold, recipe], trigger_mode="always_last", **QUIET)


def card(models: Models, name: str) -> tuple[str, str, gr.Accordion, dict | None]:
    """The model's card: (what matters most, as Markdown, the rest, the recipe's fold, the recipe).

    The card is the README of the model's folder, or else the one that publish.py would write.
    """
    engine, info = models.future(name).result()
    readme = Path(info["path"]) / "README.md"
    run, info = publish.find_run(info)
    text = (readme.read_text(encoding="utf-8") if readme.is_file()
            else publish.model_card(engine.model, engine.tokenizer, info, run, name))

    # take the metadata, which is YAML between two lines of ---, off the text
    metadata = ""
    if text.startswith("---\n"):
        _, metadata, text = text.split("---\n", 2)
    facts = re.findall(r"^(?:license|language|datasets): *\S.*$", metadata, re.MULTILINE)
    facts_line = " · ".join([*facts, models.describe(name)])

    # the introduction and the limits first
    introduction, *sections = re.split(r"^(?=## )", clean(text), flags=re.MULTILINE)
    limits = [section for section in sections if section.startswith("## Limits")]
    others = [section for section in sections if section not in limits]
    recipe = info.get("train_config")
    return ("\n\n".join([introduction, facts_line, *limits]), "\n\n".join(others),
            gr.Accordion(visible=bool(recipe)), recipe)


def clean(markdown: str) -> str:
    """A card for the page: without comments, images, links within the repository and its JSON.

    HTML tags are shown as text.
    """
    not_for_the_page = r"<!--.*?-->|^!\[.*?\]\(.*?\)$|^```json\n.*?^```$|</?details>|</?summary>"
    markdown = re.sub(not_for_the_page, "", markdown, flags=re.DOTALL | re.MULTILINE)
    markdown = re.sub(r"\[([^\]]*)\]\((?!https?://)[^)]*\)", r"\1", markdown)
    # Markdown shows a line with four spaces before it as it is
    return re.sub(r"^(?!    ).+", lambda line: re.sub(r"<(?=[a-zA-Z/])", "&lt;", line[0]),
                  markdown.strip(), flags=re.MULTILINE)
