"""The guided tour in Look inside: eight steps from text to loss, each with a view of the model."""
from html import escape
from pathlib import Path

import gradio as gr
import numpy as np
import torch
import torch.nn.functional as F

from engine.sampling import sample, weigh
from ui import layers
from ui.layers import cell, table_html, text_html
from ui.models import Models, show_user_errors
from ui.reading import SAMPLE, Place, in_text, place_in, visible
from ui.settings import QUIET

ROWS = 8  # tokens in a table
TEMPERATURES = [0.3, 0.7, 1.0, 1.5]
TOP_P = 0.9
DRAWS = 100

# --------------------------------------------------------------------------------------------------
# The views, each of the end of the text

def tokens_view(place: Place) -> str:
    numbers = [str(i) for i in place.trace.ids]
    return text_html(layers.names_of(place, in_text), [0.3] * len(numbers), notes=numbers)


def embedding_view(place: Place) -> str:
    """The tokens whose embeddings are most similar, for the last tokens of the text."""
    vocab_size = place.engine.tokenizer.vocab_size
    wte = F.normalize(place.engine.model.transformer.wte.weight[:vocab_size].detach().float())
    rows = []
    for i in list(dict.fromkeys(place.trace.ids[::-1]))[:ROWS]:
        best = (wte @ wte[i]).topk(6)  # the first one is the token itself
        cells = [cell(escape(visible(place.engine, other)), similarity, f"{similarity:.2f}")
                 for similarity, other in zip(best.values.tolist()[1:], best.indices.tolist()[1:])]
        rows.append([visible(place.engine, i), *cells])
    return table_html("Similar tokens", ["token", "most similar", "", "", "", ""], rows)


def attention_view(place: Place) -> str:
    """The head that looks most at one token, leaving out the first one and the last two."""
    attention = place.trace.attention[:, :, -1].clone()  # (L, nh, T)
    attention[:, :, [0, -2, -1]] = 0
    layer, head, _ = (int(i) for i in torch.unravel_index(attention.argmax(), attention.shape))
    return (f"<p>Layer {layer + 1}, head {head + 1}.</p>"
            f"{layers.attention_html(place, layer + 1, head + 1)}")


def mlp_view(place: Place) -> str:
    """What the attention and the MLP of each layer add to the most likely token."""
    [(name, best)] = place.likeliest(place.logits(), 1).items()
    parts = layers.contributions_to(place, best)
    attention = (parts.heads.sum(1) + parts.attention_bias).tolist()
    mlp = parts.mlp.tolist()
    largest = max(map(abs, attention + mlp)) or 1.0
    rows = [[f"layer {layer}", *(cell(f"{value:+.2f}", value / largest) for value in values)]
            for layer, values in enumerate(zip(attention, mlp), 1)]
    return (f"<p>Added to the score of “{escape(name)}”:</p>"
            f"{table_html('Attention and MLP', ['', 'attention', 'MLP'], rows)}")


def logits_view(place: Place) -> str:
    logits = place.logits()
    probabilities = np.exp(logits - logits.max())
    probabilities /= probabilities.sum()
    rows = [[name, cell(f"{logits[i]:.2f}"), cell(f"{probabilities[i]:.1%}", probabilities[i])]
            for name, i in place.likeliest(logits, ROWS).items()]
    return table_html("Logits", ["next token", "logit", "probability"], rows)


def temperature_view(place: Place) -> str:
    logits, columns = place.logits(), []
    for temperature in TEMPERATURES:
        weights, _ = weigh(logits, temperature)
        columns.append(weights / weights.sum())
    rows = [[name, *(cell(f"{p[i]:.1%}", p[i]) for p in columns)]
            for name, i in place.likeliest(logits, ROWS).items()]
    return table_html("Temperature", ["temperature", *map(str, TEMPERATURES)], rows)


def sampling_view(place: Place) -> str:
    """How often each token is sampled."""
    logits = place.logits()
    weights, kept = weigh(logits, 1.0, top_p=TOP_P)
    probabilities = dict(zip(kept.tolist(), (weights / weights.sum()).tolist()))
    uniforms = np.random.default_rng(0).random(DRAWS)
    drawn = [sample(logits, uniform, top_p=TOP_P) for uniform in uniforms]
    rows = []
    for name, i in place.likeliest(logits, ROWS).items():
        p = probabilities.get(i, 0.0)
        rows.append([name, cell(f"{p:.1%}", p), cell(str(drawn.count(i)), drawn.count(i) / DRAWS)])
    head = ["next token", f"top-p {TOP_P}", f"in {DRAWS} draws"]
    return table_html("Sampling", head, rows) + f"<p>Tokens to choose from: {len(kept):,}.</p>"


def loss_view(place: Place) -> str:
    ids, V = place.trace.ids, place.engine.tokenizer.vocab_size
    logits = place.trace.lens(list(range(len(ids) - 1)))[-1, :, :V]  # (T - 1, V)
    losses = F.cross_entropy(logits.cpu(), torch.tensor(ids[1:]), reduction="none")  # (T - 1,)
    weights = (-losses / losses.max()).tolist()
    notes = [f"{loss:.1f}" for loss in losses.tolist()]
    return (text_html(layers.names_of(place, in_text)[1:], weights, notes=notes)
            + f"<p>The mean, which is the loss of this text: {losses.mean():.2f} nats.</p>")


# --------------------------------------------------------------------------------------------------
# The steps

VIEWS = [tokens_view, embedding_view, attention_view, mlp_view, logits_view, temperature_view,
         sampling_view, loss_view]
# a title and a paragraph for each view
STEPS = (Path(__file__).parents[1] / "assets" / "tour.md").read_text("utf-8").split("\n## ")[1:]


def build(models: Models, model: gr.Dropdown):
    """Lays out the button that starts the tour, and the tour, which is hidden until then."""
    start = gr.Button("Take the guided tour: eight steps from text to loss", variant="primary",
                      elem_id="tour-start")
    with gr.Row(visible=False, elem_id="tour") as panel:
        with gr.Column(scale=2, min_width=300):
            paragraph = gr.Markdown(elem_id="tour-text")
            with gr.Row():
                back = gr.Button("Back", min_width=80, elem_id="tour-back")
                forward = gr.Button("Next", variant="primary", min_width=80, elem_id="tour-next")
                close = gr.Button("Close", min_width=80, elem_id="tour-close")
        with gr.Column(scale=3, min_width=300):
            view = gr.HTML(elem_id="tour-view")
    number = gr.State(0)

    def move(by: int):
        """An event handler that shows another step."""
        return lambda number, name: show(models, number + by, name)

    def appear(visible: bool):
        """An event handler that shows the tour or the button that starts it."""
        return lambda: (gr.Row(visible=visible), gr.Button(visible=not visible))

    options = {"inputs": [number, model], "outputs": [number, paragraph, view, back, forward],
               **QUIET}
    shown = start.click(lambda number, name: show(models, 0, name), **options)
    shown.then(appear(True), None, [panel, start], **QUIET)
    back.click(move(-1), **options)
    forward.click(move(1), **options)
    model.change(move(0), **options)
    close.click(appear(False), None, [panel, start], **QUIET)


def show(models: Models, number: int, model: str):
    """The step's number, paragraph and view, and which buttons can be used."""
    with show_user_errors():
        place = place_in(models, SAMPLE, model, len(SAMPLE) + 1)
    return (number, f"### {number + 1} of {len(STEPS)}: {STEPS[number]}", VIEWS[number](place),
            gr.update(interactive=number > 0), gr.update(interactive=number < len(STEPS) - 1))
