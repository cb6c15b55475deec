"""The layers in Look inside: attention, logit lens, and what each part adds to a prediction.

The views are tables and texts in HTML (ui/static/views.html), which look.css shades by weight.
"""
import base64
import io

import gradio as gr
import torch
from PIL import Image

from engine.internals import Contributions
from ui.models import Models
from ui.reading import LATEST, Place, in_text, place_in, visible
from ui.settings import HTML, QUIET, TEXTS

LENS_COLUMNS = 12  # tokens

# --------------------------------------------------------------------------------------------------
# The page

def build(models: Models, chosen: list[gr.Component]):
    """Lays out the views for the chosen token (text, model, position) and connects their events."""
    gr.Markdown(TEXTS["layers"])
    with gr.Tabs():
        with gr.Tab("Attention"):
            gr.Markdown(TEXTS["attention"])
            with gr.Row():
                with gr.Column(scale=5):
                    heads = gr.HTML(js_on_load="page.chooseHead(element, trigger)",
                                    elem_id="layers-heads")
                with gr.Column(scale=4):
                    with gr.Row():
                        box = {"minimum": 1, "maximum": 12, "step": 1, "min_width": 140}
                        layer = gr.Slider(value=3, label="Layer", elem_id="layers-layer", **box)
                        head = gr.Slider(value=1, label="Head", elem_id="layers-head", **box)
                    attention = gr.HTML(elem_id="layers-attention")
        with gr.Tab("Logit lens"):
            gr.Markdown(TEXTS["logit lens"])
            lens = gr.HTML(elem_id="layers-lens")
        with gr.Tab("Contributions"):
            gr.Markdown(TEXTS["contributions"])
            prediction = gr.Dropdown([], label="Prediction", elem_id="layers-prediction")
            contributions = gr.HTML(elem_id="layers-contributions")

    def at_place(view):
        """An event handler that shows the view of the chosen token."""
        def handle(text, model, position, *values):
            return view(place_in(models, text, model, position), *values)
        return handle

    latest = {**LATEST, "api_visibility": "private"}
    opened = gr.context.Context.root_block.load
    gr.on([opened, *(box.change for box in chosen)], at_place(show), [*chosen, layer, head],
          [heads, layer, head, attention, lens, prediction, contributions], **latest)
    gr.on([layer.change, head.change], at_place(attention_html), [*chosen, layer, head], attention,
          **latest)
    prediction.input(at_place(contributions_html), [*chosen, prediction], contributions, **latest)
    heads.click(chosen_head, None, [layer, head], **QUIET)


def chosen_head(event: gr.EventData) -> tuple[int, int]:
    """The layer and the head of a click in the table, counted from 1."""
    return event.layer, event.head


def show(place: Place, layer: int, head: int):
    """All views of a place, with the sliders' values within the model's sizes."""
    n_layer, n_head = place.trace.attention.shape[:2]
    choices = predictions(place)
    token = choices[0][1]

    def limit(value: int, size: int) -> dict:
        # leave a valid value as it is: it may have changed since this request
        return gr.update(maximum=size) if value <= size else gr.update(maximum=size, value=size)

    return (heads_html(place), limit(layer, n_layer), limit(head, n_head),
            attention_html(place, min(layer, n_layer), min(head, n_head)),
            lens_html(place), gr.Dropdown(choices, value=token), contributions_html(place, token))


# --------------------------------------------------------------------------------------------------
# Tables

def cell(content: str, weight: float = 0.0, title: str = "") -> tuple[str, float, str]:
    """A cell of a table, which is shaded by a weight from -1 to 1."""
    return content, weight, title


def signed_rows(values: torch.Tensor) -> list[list]:
    """Rows of a table: layers of values (L, N), shaded by their share of the largest one."""
    largest = values.abs().max().item() or 1.0
    return [[f"layer {layer}", *(cell(f"{value:+.2f}", value / largest) for value in row)]
            for layer, row in enumerate(values.tolist(), 1)]


# --------------------------------------------------------------------------------------------------
# Attention

def names_of(place: Place, name=visible) -> list[str]:
    """Names of the traced tokens, and a question mark for the end of the text."""
    return [*(name(place.engine, i) for i in place.trace.ids), "?"]


def reader_of(place: Place) -> int:
    """The row whose attention is shown: the token's, or the last one at the end of the text."""
    return min(place.row, len(place.trace.ids) - 1)


def heads_html(place: Place) -> str:
    """A table of layers and heads: where each looks most from the place's token."""
    names = names_of(place)
    best = place.trace.attention[:, :, reader_of(place)].max(-1)  # (L, nh)
    rows = []
    for layer, (weights, targets) in enumerate(zip(best.values.tolist(), best.indices.tolist()), 1):
        cells = [cell(HTML.head(layer, head, weight, names[target]), weight)
                 for head, (weight, target) in enumerate(zip(weights, targets), 1)]
        rows.append([f"layer {layer}", *cells])
    head = ["", *(f"head {head + 1}" for head in range(best.values.size(1)))]
    return HTML.table("Heads", head, rows)


def attention_html(place: Place, layer: int, head: int) -> str:
    """The attention of one head (both counted from 1) from the place's token, over the text, and
    the matrix of all tokens."""
    matrix = place.trace.attention[layer - 1, head - 1]  # (T, T)
    row = reader_of(place)
    file = io.BytesIO()
    Image.fromarray((matrix.sqrt() * 255).byte().cpu().numpy()).save(file, "png")
    picture = base64.b64encode(file.getvalue()).decode()
    return HTML.attention(
        names_of(place), names_of(place, in_text), matrix[row].tolist(), row, picture)


# --------------------------------------------------------------------------------------------------
# Logit lens

def lens_html(place: Place) -> str:
    """A table of layers and tokens: the most likely next token after each layer."""
    rows = range(max(0, place.row - LENS_COLUMNS), place.row)
    best = place.lens(list(rows)).softmax(-1).max(-1)  # (L + 1, R)
    names = names_of(place)
    lines = []
    for layer, (probabilities, ids) in enumerate(zip(best.values.tolist(), best.indices.tolist())):
        cells = []
        for row, probability, token in zip(rows, probabilities, ids):
            name = visible(place.engine, token)
            content = HTML.prediction(name, name == names[row + 1])
            cells.append(cell(content, probability, f"{probability:.1%}"))
        lines.append([f"layer {layer}" if layer else "embedding", *cells])
    lines.append(["in the text", *(cell(names[row + 1]) for row in rows)])
    return HTML.table("Logit lens", ["after", *(names[row] for row in rows)], lines)


# --------------------------------------------------------------------------------------------------
# Contributions

def predictions(place: Place) -> list[tuple[str, int]]:
    """(name, id) of the token at the place and of the most likely ones there."""
    choices = list(place.likeliest(place.logits()).items())
    if place.token is not None:
        token = visible(place.engine, place.token), place.token
        choices = [token, *(choice for choice in choices if choice != token)]
    return choices


def contributions_to(place: Place, token: int) -> Contributions:
    """What each part adds to the token's logit at the place, above the mean of all logits. The
    softmax ignores what all logits have in common."""
    wte = place.engine.model.transformer.wte.weight.detach()
    average = wte[:place.engine.tokenizer.vocab_size].mean(0)  # (C,)
    return place.trace.contributions(place.row - 1, wte[token] - average)


def contributions_html(place: Place, token: int) -> str:
    """A table of layers and their parts: what each adds to the logit of a token."""
    parts = contributions_to(place, token)
    # one row per layer: the heads, the bias they share, the MLP
    values = torch.cat([parts.heads, parts.attention_bias[:, None], parts.mlp[:, None]], 1)
    rows = [[*row, cell(f"{total:+.2f}")]
            for row, total in zip(signed_rows(values), values.sum(1).tolist())]
    heads = [f"head {head + 1}" for head in range(parts.heads.size(1))]
    embedding = parts.token + parts.position
    sentence = (
        f"After “{names_of(place)[place.row - 1]}”, the logit of “{visible(place.engine, token)}” "
        f"is {parts.total():+.2f}: {embedding.item():+.2f} from the embeddings of token and "
        f"position, {values.sum().item():+.2f} from the layers, "
        f"{parts.final_bias.item():+.2f} from the bias of the final LayerNorm.")
    return HTML.table("Contributions", ["", *heads, "bias", "MLP", "sum"], rows, before=sentence)
