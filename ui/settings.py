"""What the tabs share: texts, HTML, and the settings of a text as components and as values."""
import secrets
from pathlib import Path

import gradio as gr
import jinja2

from common.errors import UserError
from engine.sampling import MAX_STOP_CHARS, Sampling
from ui.models import Models

MAX_BYTES = 40_000  # in a prompt
MAX_STOPS = 4
TEMPERATURE, TOP_K, TOP_P, LENGTH = 0.7, 0, 0.9, 300  # defaults, on the page and in its API
# for an event that is not part of the API and needs no progress bar
QUIET = {"api_visibility": "private", "show_progress": "hidden"}
ASSETS = Path(__file__).parents[1] / "assets"

SAMPLING = ("temperature", "top_k", "top_p")
# the options of each setting's component
RANGES = {
    "temperature": {"minimum": 0.1, "maximum": 2.0, "step": 0.05, "value": TEMPERATURE},
    "top_k": {"minimum": 0, "maximum": 200, "step": 1, "value": TOP_K},
    "top_p": {"minimum": 0.05, "maximum": 1.0, "step": 0.01, "value": TOP_P},
    "length": {"minimum": 1, "maximum": 2_000, "step": 1, "value": LENGTH},
    "versions": {"minimum": 1, "maximum": 4, "step": 1, "value": 1},
    "seed": {"minimum": 0, "maximum": 2**53, "step": 1, "value": 42},
}


def read_sections(file: str) -> dict[str, str]:
    """The sections of a Markdown file in assets/: title -> text."""
    _, *sections = (ASSETS / file).read_text(encoding="utf-8").split("\n# ")
    return dict(section.strip().split("\n\n", 1) for section in sections)


TEXTS = read_sections("page.md")
# functions that write HTML and escape their arguments
FILES = jinja2.FileSystemLoader(Path(__file__).parent / "static")
HTML = jinja2.Environment(loader=FILES, autoescape=True).get_template("views.html").module


def label_of(name: str) -> str:
    return name.replace("_", "-").capitalize()


# --------------------------------------------------------------------------------------------------
# Components

def slider(name: str, tab: str = "", **changes) -> gr.Slider | gr.Number:
    """The component for a setting. `tab` prefixes its element id; `changes` override options."""
    options = {"label": label_of(name), "info": TEXTS[name], **RANGES[name],
               "precision": 0 if RANGES[name]["step"] == 1 else None,
               "elem_id": tab + name.replace("_", "-"), **changes}
    return gr.Number(**options) if name == "seed" else gr.Slider(**options)


def model_box(models: Models, tab: str = "", value: str | None = None) -> gr.Dropdown:
    """The list of models, with a line about the selected one as soon as it is loaded."""
    def describe(name: str):
        return gr.Dropdown(info=models.describe(name))

    box = gr.Dropdown(models.names, value=value or models.default, label="Model",
                      info="Loading …", elem_id=f"{tab}model")
    # without triggers: when the page opens, and when the input changes
    gr.on(fn=describe, inputs=box, outputs=box, trigger_mode="always_last", **QUIET)
    return box


def plain_box(label: str, elem_id: str, placeholder: str = "") -> gr.Textbox:
    """A sentence without a frame."""
    return gr.Textbox(label=label, show_label=False, container=False, interactive=False,
                      max_lines=8, elem_id=elem_id, elem_classes="plain", placeholder=placeholder)


# --------------------------------------------------------------------------------------------------
# Validation

def in_range(name: str, value) -> bool:
    """Whether a value from outside is a valid number for a setting."""
    limits = RANGES[name]
    valid = type(value) in (int, float) and limits["minimum"] <= value <= limits["maximum"]
    return valid and (limits["step"] != 1 or value == int(value))


def validate(prompt: str, temperature: float, top_k: int, top_p: float, length: int,
             seed: int | None, versions: int = 1, stop: list[str] = ()) -> Sampling:
    """The sampling settings from a visitor's input; without a seed they get a random one.

    Raises UserError, naming the setting, if a value is not valid.
    """
    if not isinstance(prompt, str) or len(prompt.encode("utf-8", "replace")) > MAX_BYTES:
        raise UserError(f"The prompt must be a text of at most {MAX_BYTES:,} bytes.")

    # the numbers
    seed = secrets.randbits(32) if seed is None else seed
    numbers = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "length": length,
               "seed": seed, "versions": versions}
    for name, value in numbers.items():
        if not in_range(name, value):
            limits = RANGES[name]
            kind = "a whole number" if limits["step"] == 1 else "a number"
            raise UserError(f"{label_of(name)} must be {kind} from {limits['minimum']} to "
                            f"{limits['maximum']}, not {value!r:.40}.")

    # the stop strings
    valid = isinstance(stop, list | tuple) and len(stop) <= MAX_STOPS
    if not valid or not all(isinstance(s, str) and len(s) <= MAX_STOP_CHARS for s in stop):
        raise UserError(f"Give at most {MAX_STOPS} stop strings, "
                        f"each of at most {MAX_STOP_CHARS} characters.")

    # several versions are ranked by their log-probabilities
    return Sampling(
        max_new_tokens=int(length), temperature=temperature, top_k=int(top_k) or None, top_p=top_p,
        stop=tuple(stop), seed=int(seed), logprobs=0 if versions > 1 else None)
