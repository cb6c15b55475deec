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
from ui import layers, reading, tour
from ui.models import Models
from ui.settings import QUIET, SAMPLING, TEXTS, model_box, plain_box, slider
from ui.stream import visitor

FORK_LENGTH = 100  # tokens
REFRESH_TOKENS = 4  # update the fork on the page after this many tokens

SAMPLE_POSITION = 13  # the second "fox" for the default model

# a token's colour, by the class of its probability
COLOURS = dict(zip(reading.CLASSES, ("#5eead4", "#bef264", "#fde047", "#fdba74", "#fca5a5")))

# --------------------------------------------------------------------------------------------------
# The page

def build(models: Models) -> tuple[gr.Textbox, gr.Dropdown]:
    """Lays out the tab and connects its events.

    Returns the text and its model, which app.py connects to the Write tab.
    """
    model = model_box(models, "look-")
    tour.build(models, model)
    with gr.Row():
        # the whole text
        with gr.Column(scale=5):
            text = gr.Textbox(reading.SAMPLE, label="Text", info=TEXTS["text"], lines=4,
                              max_lines=10, max_length=reading.MAX_TEXT, elem_id="look-text")
            summary = plain_box("Summary", "look-summary")
            tokens = gr.HighlightedText(
                label="Tokens, coloured by their probability. Click one to look at it.",
                color_map=COLOURS, show_legend=True, elem_id="look-tokens")
            chosen_mark = gr.HTML()  # the style that marks the chosen token
            with gr.Row():
                sliders = [slider(name, "look-", min_width=180, buttons=[], info=None)
                           for name in SAMPLING]
        # one position: the most likely tokens, and the text that continues from one of them
        with gr.Column(scale=4):
            position = gr.Number(SAMPLE_POSITION, label="Position", info=TEXTS["position"],
                                 precision=0, elem_id="look-position")
            token = plain_box("Token", "look-token")
            with gr.Row():
                box = {"show_heading": False, "min_width": 150}
                lists = [gr.Label(label="Without the settings", elem_id="look-expected", **box),
                         gr.Label(label="With the settings", elem_id="look-sampled", **box)]
            fork_text = gr.Textbox(label="What if", placeholder=TEXTS["fork"], lines=4,
                                   max_lines=10, interactive=False, buttons=["copy"],
                                   elem_id="look-fork")
            again = gr.Button("Look inside the new text", size="sm", elem_id="look-again")
    layers.build(models, [text, model, position])

    # without triggers: when the page opens, and when an input changes
    inputs = [text, model, position, *sliders]
    inspected = gr.on(fn=MethodType(inspect, models), inputs=[text, model],
                      outputs=[summary, tokens], api_name="inspect", **reading.LATEST)
    # below a text that cannot be read, clear the tokens of the earlier one
    inspected.failure(lambda: ("", []), None, [summary, tokens], **QUIET)
    gr.on(fn=MethodType(alternatives, models), inputs=inputs, outputs=[token, *lists],
          api_name="alternatives", **reading.LATEST)
    tokens.select(position_of, None, position, **QUIET)
    gr.on(fn=None, inputs=position, outputs=chosen_mark, js="page.markToken")
    forking = gr.on([shown.select for shown in lists], MethodType(fork, models), inputs, fork_text,
                    concurrency_limit=32, concurrency_id="engine", **QUIET)
    # a new text ends the fork of the old one
    gr.on([text.change, model.change], None, None, fork_text, js="() => ''", cancels=forking)
    # the browser copies the fork into the text box
    again.click(None, fork_text, text, js="fork => fork")
    return text, model


def position_of(token: gr.SelectData) -> int:
    return token.index + 1


# --------------------------------------------------------------------------------------------------
# The whole text

def inspect(models: Models, text: str, model: str):
    """Returns a summary of the text, and its tokens with their classes of probability."""
    engine, ids, text = reading.read(models, text, model)
    tokens = engine.inspect(text, top=0)
    spans, scored = [], []
    for i, token in zip(ids, tokens):
        label = None
        # the first token has no probability if the vocabulary has no <|endoftext|> to precede it
        if token["logprob"] is not None:
            label = list(COLOURS)[reading.class_of(token["logprob"])]
            scored.append((token["logprob"], len(engine.tokenizer.decode_bytes([i]))))
        line_end = "\n" if token["text"].endswith("\n") else ""
        spans.append((reading.in_text(engine, i) + line_end, label))

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
def logprobs_at(place: reading.Place):
    """Log-probabilities (V,) of the token at the place, in the engine's precision.

    They come with a token that the engine samples, which is ignored; the engine keeps the KV cache,
    which a fork then reuses.
    """
    ids = list(place.ids[:place.index][-place.engine.block_size:])
    vocab_size = place.engine.tokenizer.vocab_size
    request = place.engine.submit(ids, max_new_tokens=1, temperature=0, logprobs=vocab_size,
                                  client=visitor())
    (_, token), *_ = request  # to its end
    return np.array([logprob for _, logprob in sorted(token.top)], np.float32)


def alternatives(models: Models, text: str, model: str, position: int, temperature: float,
                 top_k: int, top_p: float):
    """Returns a sentence about the token at the position, and the most likely tokens there with two
    probabilities: the model's, and the one with which the settings sample them."""
    place = reading.place_in(models, text, model, position)
    logprobs = logprobs_at(place)  # (V,)
    expected = np.exp(logprobs)  # (V,)
    sampled = reading.probabilities(logprobs, temperature, top_k or None, top_p)  # (V,)

    token = place.token
    if token is None:
        sentence = "This is the end of the text. The lists show what could come next."
    else:
        rank = 1 + (logprobs > logprobs[token]).sum()
        sentence = (
            f"“{reading.visible(place.engine, token)}” has probability {expected[token]:.2%}, rank "
            f"{rank:,} of {len(logprobs):,} tokens, {-logprobs[token] / math.log(2):.2f} bits. "
            f"With the settings its probability is {sampled[token]:.2%}, and the number of tokens "
            f"to choose from is {(sampled > 0).sum():,}. ␣ is a space.")
    names = place.likeliest(logprobs)
    return sentence, *({name: float(p[i]) for name, i in names.items()}
                       for p in (expected, sampled))


def fork(models: Models, choice: gr.SelectData, text: str, model: str, position: int,
         temperature: float, top_k: int, top_p: float):
    """Streams the text up to the position, the chosen token, and the model's continuation."""
    place = reading.place_in(models, text, model, position)
    token = place.likeliest(logprobs_at(place)).get(str(choice.value))
    if token is None:
        raise UserError("Choose one of the alternatives.")
    prompt = [*place.ids[:place.index], token]
    written = place.engine.tokenizer.decode(prompt[place.start:])
    pieces = place.engine.stream(prompt, max_new_tokens=FORK_LENGTH, temperature=temperature,
                                 top_k=top_k or None, top_p=top_p, client=visitor())
    for count, piece in enumerate(pieces):
        written += piece
        if count % REFRESH_TOKENS == 0:
            yield written
    yield written
