"""The Look inside tab: how a model reads a text, token by token.

It shows the probability of each token, what else the model expected at a position, and how the text
would continue from one of these alternatives (a fork).
"""
import functools
import math
from types import MethodType

import gradio as gr
import numpy as np

from common.errors import UserError
from engine.sampling import weigh
from generate import Engine
from ui import layers, tour
from ui.models import Models, show_user_errors
from ui.reading import LATEST, MAX_TEXT, SAMPLE, Place, in_text, place_in, read, visible
from ui.settings import QUIET, model_box, plain_box, slider
from ui.stream import visitor

FORK_LENGTH = 100  # tokens
REFRESH_TOKENS = 4  # update the fork on the page after this many tokens

SAMPLE_POSITION = 13  # the second "fox" for the default model

# The colour of a token, by the probability that the model gave it: label -> (lower bound, colour).
PROBABILITY_CLASSES = {
    "above 50%": (0.5, "#5eead4"),
    "10 to 50%": (0.1, "#bef264"),
    "1 to 10%": (0.01, "#fde047"),
    "0.1 to 1%": (0.001, "#fdba74"),
    "below 0.1%": (0.0, "#fca5a5"),
}

# --------------------------------------------------------------------------------------------------
# The page

def build(models: Models) -> tuple[gr.Textbox, gr.Dropdown]:
    """Lays out the tab and connects its events.

    Returns the text and its model, which app.py connects to the Write tab.
    """
    model = model_box(models, "look-")
    tour.build(models, model)
    with gr.Row():
        with gr.Column(scale=5, min_width=320):
            text = gr.Textbox(
                SAMPLE, label="Text",
                info="Any text, written by a model or by you. The page updates as you type.",
                lines=4, max_lines=10, max_length=MAX_TEXT, elem_id="look-text")
            summary = plain_box("Summary", "look-summary")
            tokens = gr.HighlightedText(
                label="Tokens, coloured by their probability. Click one to look at it.",
                color_map={label: colour for label, (_, colour) in PROBABILITY_CLASSES.items()},
                show_legend=True, elem_id="look-tokens")
            chosen_mark = gr.HTML()  # the style that marks the chosen token
            with gr.Row():
                sliders = [slider(name, "look-", min_width=180, buttons=[], info=None)
                           for name in ("temperature", "top_k", "top_p")]
        with gr.Column(scale=4, min_width=320):
            position, token, lists, fork_text, again = build_position()
    layers.build(models, [text, model, position])

    # without triggers: when the page opens, and when an input changes
    inputs = [text, model, position, *sliders]
    inspected = gr.on(fn=MethodType(inspect, models), inputs=[text, model],
                      outputs=[summary, tokens], api_name="inspect", **LATEST)
    # no tokens of an earlier text stay below a text that cannot be read
    inspected.failure(lambda: ("", []), None, [summary, tokens], **QUIET)
    gr.on(fn=MethodType(alternatives, models), inputs=inputs, outputs=[token, *lists],
          api_name="alternatives", **LATEST)
    tokens.select(position_of, None, position, **QUIET)
    gr.on(fn=None, inputs=position, outputs=chosen_mark, js="page.markToken")
    forking = gr.on([shown.select for shown in lists], MethodType(fork, models), inputs, fork_text,
                    concurrency_limit=32, concurrency_id="engine", **QUIET)
    # a new text ends the fork of the old one
    gr.on([text.change, model.change], None, None, fork_text, js="() => ''", cancels=forking)
    # the browser copies the fork into the text box
    again.click(None, fork_text, text, js="fork => fork")
    return text, model


def build_position():
    """Lays out what is shown about one token: its position, a sentence, the most likely tokens
    without and with the settings, and the text that continues from one of them."""
    position = gr.Number(
        SAMPLE_POSITION, label="Position", precision=0,
        info="The token to look at, counted from 1. The arrow keys move through the text.",
        elem_id="look-position")
    token = plain_box("Token", "look-token")
    with gr.Row():
        lists = [gr.Label(label=label, show_heading=False, min_width=150, elem_id=elem_id)
                 for label, elem_id in (("Without the settings", "look-expected"),
                                        ("With the settings", "look-sampled"))]
    fork_text = gr.Textbox(
        label="What if", lines=4, max_lines=10, interactive=False, buttons=["copy"],
        placeholder="Click a token in the lists above, and the model continues the text with it.",
        elem_id="look-fork")
    again = gr.Button("Look inside the new text", size="sm", elem_id="look-again")
    return position, token, lists, fork_text, again


def position_of(token: gr.SelectData) -> int:
    return token.index + 1


# --------------------------------------------------------------------------------------------------
# The whole text

def inspect(models: Models, text: str, model: str):
    """Returns a summary of the text, and its tokens with their classes of probability."""
    with show_user_errors():
        engine, ids, text = read(models, text, model)
        tokens = engine.inspect(text, top=0)

    spans, scored = [], []
    for i, token in zip(ids, tokens):
        label = None
        # the first token has no probability if the vocabulary has no <|endoftext|> to precede it
        if token["logprob"] is not None:
            label = next(label for label, (lowest, _) in PROBABILITY_CLASSES.items()
                         if math.exp(token["logprob"]) >= lowest)
            scored.append((token["logprob"], len(engine.tokenizer.decode_bytes([i]))))
        line_end = "\n" if token["text"].endswith("\n") else ""
        spans.append((in_text(engine, i) + line_end, label))

    summary = f"{len(ids):,} tokens, {len(text.encode(errors='replace')):,} bytes"
    if scored:
        nats, scored_bytes = (sum(column) for column in zip(*scored))
        loss = -nats / len(scored)
        summary += (f" · {loss:.3f} nats per token · perplexity {math.exp(loss):,.2f}"
                    f" · {-nats / math.log(2) / scored_bytes:.3f} bits per byte")
    return summary, spans


# --------------------------------------------------------------------------------------------------
# One position

@functools.lru_cache(maxsize=4)
def next_logprobs(engine: Engine, ids: tuple[int, ...]):
    """Log-probabilities (V,) of the token that follows the ids, in the engine's precision.

    They come with a token that the engine samples, which is ignored; the engine keeps the KV cache,
    which a fork then reuses.
    """
    events = list(engine.submit(list(ids), max_new_tokens=1, temperature=0,
                                logprobs=engine.tokenizer.vocab_size, client=visitor()))
    _, token = events[0]
    order, values = zip(*token.top)
    logprobs = np.empty(len(order), np.float32)
    logprobs[list(order)] = values
    return logprobs


def logprobs_at(place: Place):
    """Log-probabilities (V,) of the token at the place."""
    return next_logprobs(place.engine, tuple(place.ids[:place.index][-place.engine.block_size:]))


def alternatives(models: Models, text: str, model: str, position: int, temperature: float,
                 top_k: int, top_p: float):
    """Returns a sentence about the token at the position, and the most likely tokens there with two
    probabilities: the model's, and the one with which the settings sample them."""
    with show_user_errors():
        place = place_in(models, text, model, position)
        logprobs = logprobs_at(place)  # (V,)

    # the distribution that sampling draws from
    weights, ids = weigh(logprobs, temperature, top_k or None, top_p)
    sampled = np.zeros(len(logprobs))  # (V,)
    sampled[slice(None) if ids is None else ids] = weights / weights.sum(dtype=np.float64)
    expected = np.exp(logprobs)  # (V,)

    token = place.token
    if token is None:
        sentence = "This is the end of the text. The lists show what could come next."
    else:
        rank = 1 + (logprobs > logprobs[token]).sum()
        candidates = (sampled > 0).sum()
        name = visible(place.engine, token)
        sentence = (
            f"“{name}” has probability {expected[token]:.2%}, rank {rank:,} of "
            f"{len(logprobs):,} tokens, {-logprobs[token] / math.log(2):.2f} bits. With the "
            f"settings its probability is {sampled[token]:.2%}, and the number of tokens to choose "
            f"from is {candidates:,}. ␣ is a space.")
    names = place.likeliest(logprobs)
    return (sentence, {name: float(expected[i]) for name, i in names.items()},
            {name: float(sampled[i]) for name, i in names.items()})


def fork(models: Models, choice: gr.SelectData, text: str, model: str, position: int,
         temperature: float, top_k: int, top_p: float):
    """Streams the text up to the position, the chosen token, and the model's continuation."""
    with show_user_errors():
        place = place_in(models, text, model, position)
        engine = place.engine
        token = place.likeliest(logprobs_at(place)).get(str(choice.value))
        if token is None:
            raise UserError("Choose one of the alternatives.")
        prompt = [*place.ids[:place.index], token]
        written = engine.tokenizer.decode(prompt[place.start:])
        pieces = engine.stream(prompt, max_new_tokens=FORK_LENGTH, temperature=temperature,
                               top_k=top_k or None, top_p=top_p, client=visitor())
        for count, piece in enumerate(pieces):
            written += piece
            if count % REFRESH_TOKENS == 0:
                yield written
        yield written
