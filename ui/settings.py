"""What the tabs share: the settings of a text, as components and as values, and the page's API."""
import inspect
import secrets
from collections.abc import Callable
from typing import NamedTuple, get_args

import gradio as gr

from common.errors import UserError
from engine.sampling import Sampling
from generate import Dtype
from ui.models import Models, show_user_errors

MAX_BYTES = 40_000  # in a prompt
MAX_STOPS = 4
MAX_STOP_CHARS = 100  # in one stop string
DTYPES = list(get_args(Dtype))
TEMPERATURE, TOP_K, TOP_P, LENGTH = 0.7, 0, 0.9, 300  # defaults, on the page and in its API
# for an event that is not part of the API and needs no progress bar
QUIET = {"api_visibility": "private", "show_progress": "hidden"}


class Range(NamedTuple):
    minimum: float
    maximum: float
    step: float
    default: float
    info: str


RANGES = {
    "temperature": Range(
        0.1, 2.0, 0.05, TEMPERATURE, "Lower is more predictable, higher is more surprising."),
    "top_k": Range(
        0, 200, 1, TOP_K, "Sample from the k most likely tokens only. 0 turns this off."),
    "top_p": Range(
        0.05, 1.0, 0.01, TOP_P,
        "Sample from the smallest set of tokens with this total probability. 1 turns this off."),
    "length": Range(
        1, 2_000, 1, LENGTH, "How many tokens to write. A token is a word or a part of one."),
    "versions": Range(
        1, 4, 1, 1,
        "Number of continuations. The most likely one comes first when all have ended."),
    "seed": Range(
        0, 2**53, 1, 42, "The same seed and settings give the same text."),
}


def label_of(name: str) -> str:
    return name.replace("_", "-").capitalize()


# --------------------------------------------------------------------------------------------------
# Components

def slider(name: str, tab: str = "", **changes) -> gr.Slider | gr.Number:
    """The component for a setting. `tab` prefixes its element id; `changes` override options."""
    limits = RANGES[name]
    options = {
        "label": label_of(name),
        "info": limits.info,
        "value": limits.default,
        "elem_id": tab + name.replace("_", "-"),
        "precision": 0 if limits.step == 1 else None,
        **changes,
    }
    if name == "seed":
        return gr.Number(**options)
    return gr.Slider(limits.minimum, limits.maximum, step=limits.step, **options)


def model_box(models: Models, tab: str = "", value: str | None = None) -> gr.Dropdown:
    """The list of models, with a line about the selected one as soon as it is loaded."""
    def describe(name: str):
        with show_user_errors():
            return gr.Dropdown(info=models.describe(name), choices=models.list_names())

    box = gr.Dropdown(models.names, value=value or models.default, label="Model",
                      info="Loading …", elem_id=f"{tab}model")
    # without triggers: when the page opens, and when the input changes
    gr.on(fn=describe, inputs=box, outputs=box, trigger_mode="always_last", **QUIET)
    return box


def plain_box(label: str, elem_id: str, placeholder: str = "") -> gr.Textbox:
    """A sentence without a frame."""
    return gr.Textbox(label=label, show_label=False, container=False, interactive=False,
                      max_lines=8, elem_id=elem_id, elem_classes="plain", placeholder=placeholder)


def offer(function: Callable, name: str):
    """Makes a function part of the page's API, under a name."""
    gr.api(function, api_name=name, concurrency_limit=None)
    # Gradio labels the values 1st, 2nd, …: name them as the function does
    *_, endpoint = gr.context.Context.root_block.fns.values()
    for value, parameter in zip(endpoint.inputs, inspect.signature(function).parameters):
        value.label = parameter
    endpoint.outputs[0].label = "result"


# --------------------------------------------------------------------------------------------------
# Validation

def in_range(name: str, value) -> bool:
    """Whether a value from outside is a valid number for a setting."""
    limits = RANGES[name]
    valid = type(value) in (int, float) and limits.minimum <= value <= limits.maximum
    return valid and (limits.step != 1 or value == int(value))


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
            kind = "a whole number" if limits.step == 1 else "a number"
            raise UserError(f"{label_of(name)} must be {kind} from {limits.minimum} to "
                            f"{limits.maximum}, not {value!r:.40}.")

    # the stop strings
    valid = isinstance(stop, list | tuple) and len(stop) <= MAX_STOPS
    if not valid or not all(isinstance(s, str) and len(s) <= MAX_STOP_CHARS for s in stop):
        raise UserError(f"Give at most {MAX_STOPS} stop strings, "
                        f"each of at most {MAX_STOP_CHARS} characters.")

    # several versions are ranked by their log-probabilities
    return Sampling(
        max_new_tokens=int(length), temperature=float(temperature), top_k=int(top_k) or None,
        top_p=float(top_p), stop=tuple(stop), seed=int(seed),
        logprobs=0 if versions > 1 else None)
