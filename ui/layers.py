"""The layers in Look inside: attention, logit lens, and what each part adds to a prediction.

The views are tables and texts in HTML; ui/static/look.css shades their cells by weight.
"""
import base64
import io
from html import escape

import gradio as gr
import torch
from PIL import Image

from engine.internals import Contributions
from ui.models import Models, show_user_errors
from ui.reading import LATEST, Place, in_text, place_in, visible
from ui.settings import QUIET

LENS_COLUMNS = 12  # tokens

INTRO = """### Inside the layers
A token passes through the layers one after another. In each layer, **heads** look back at earlier
tokens and fetch something from them, then an **MLP** works on the token by itself."""
ATTENTION = """Each cell is a head: the token that it looks at most, from the chosen token, and how
much of its attention goes there. Choose a head to see all of its attention. `<|endoftext|>` stands
before every text; heads that find nothing look there."""
LENS = """What the model would predict next if it stopped after a layer. Read a column downwards to
see the prediction form; the darker, the surer, and bold if it is what comes next in the text."""
CONTRIBUTIONS = """What each part adds to the logit, the score of a token before the softmax: blue
raises it, orange lowers it, compared with the average token. The parts add up to the logit (the
final LayerNorm's scale is held fixed)."""

# --------------------------------------------------------------------------------------------------
# The page

def build(models: Models, chosen: list[gr.Component]):
    """Lays out the views for the chosen token (text, model, position) and connects their events."""
    gr.Markdown(INTRO)
    with gr.Tabs():
        with gr.Tab("Attention"):
            gr.Markdown(ATTENTION)
            with gr.Row():
                with gr.Column(scale=5, min_width=320):
                    heads = gr.HTML(js_on_load="page.chooseHead(element, trigger)",
                                    elem_id="layers-heads")
                with gr.Column(scale=4, min_width=320):
                    with gr.Row():
                        layer = gr.Slider(1, 12, 3, step=1, label="Layer", min_width=140,
                                          elem_id="layers-layer")
                        head = gr.Slider(1, 12, 1, step=1, label="Head", min_width=140,
                                         elem_id="layers-head")
                    attention = gr.HTML(elem_id="layers-attention")
        with gr.Tab("Logit lens"):
            gr.Markdown(LENS)
            lens = gr.HTML(elem_id="layers-lens")
        with gr.Tab("Contributions"):
            gr.Markdown(CONTRIBUTIONS)
            prediction = gr.Dropdown([], label="Prediction", elem_id="layers-prediction")
            contributions = gr.HTML(elem_id="layers-contributions")

    def at_place(view):
        """An event handler that shows the view of the chosen token."""
        def handle(text, model, position, *values):
            with show_user_errors():
                place = place_in(models, text, model, position)
            return view(place, *values)
        return handle

    opened = gr.context.Context.root_block.load
    gr.on([opened, *(box.change for box in chosen)], at_place(show), [*chosen, layer, head],
          [heads, layer, head, attention, lens, prediction, contributions],
          api_visibility="private", **LATEST)
    gr.on([layer.change, head.change], at_place(attention_html), [*chosen, layer, head], attention,
          api_visibility="private", **LATEST)
    prediction.input(at_place(contributions_html), [*chosen, prediction], contributions,
                     api_visibility="private", **LATEST)
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
# Shaded texts and tables

def shade(weight: float = 0.0, title: str = "", chosen: bool = False) -> str:
    """Attributes of an element that is shaded by a weight from -1 to 1."""
    classes = ("lowers " if weight < 0 else "raises ") + ("chosen" if chosen else "")
    return f'class="{classes}" style="--weight:{abs(weight):.3f}" title="{escape(title)}"'


def cell(content: str, *shading, **options) -> str:
    return f"<td {shade(*shading, **options)}>{content}</td>"


def table_html(label: str, head: list[str], rows: list[list[str]]) -> str:
    """A table that scrolls sideways. A row is the text of its heading, then cells."""
    head = "".join(f"<th scope=col>{escape(name)}</th>" for name in head)
    body = "".join(f"<tr><th scope=row>{escape(name)}</th>{''.join(cells)}</tr>"
                   for name, *cells in rows)
    return (f'<div class="shaded" role="region" tabindex="0" aria-label="{escape(label)}">'
            f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>")


def text_html(names: list[str], weights: list[float], chosen: int | None = None,
              notes: list[str] | None = None) -> str:
    """A text with shaded tokens, and a note in small letters after each of them if there are
    notes."""
    tokens = []
    for i, (name, weight) in enumerate(zip(names, weights)):
        note = f"<small>{notes[i]}</small>" if notes else ""
        attributes = shade(weight, "" if notes else f"{weight:.1%}", chosen=i == chosen)
        tokens.append(f"<span {attributes}>{escape(name)}{note}</span>")
    return f'<p class="shaded">{"<wbr>".join(tokens)}</p>'


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
    names = [escape(name) for name in names_of(place)]
    best = place.trace.attention[:, :, reader_of(place)].max(-1)  # (L, nh)
    rows = []
    for layer, (weights, targets) in enumerate(zip(best.values.tolist(), best.indices.tolist()), 1):
        cells = [cell(f'<button data-layer="{layer}" data-head="{head}">{weight:.0%} '
                      f"<b>{names[target]}</b></button>", weight)
                 for head, (weight, target) in enumerate(zip(weights, targets), 1)]
        rows.append([f"layer {layer}", *cells])
    head = ["", *(f"head {head + 1}" for head in range(best.values.size(1)))]
    return table_html("Heads", head, rows)


def attention_html(place: Place, layer: int, head: int) -> str:
    """The attention of one head (both counted from 1) from the place's token, over the text, and
    the matrix of all tokens."""
    matrix = place.trace.attention[layer - 1, head - 1]  # (T, T)
    row, T = reader_of(place), len(matrix)
    # the picture's opacity is the weight, and CSS gives it a colour and marks the token's row
    file = io.BytesIO()
    Image.fromarray((matrix.sqrt() * 255).byte().cpu().numpy()).save(file, "png")
    picture = base64.b64encode(file.getvalue()).decode()
    return (
        f"<p>“{escape(names_of(place)[row])}” looks back at:</p>"
        f"{text_html(names_of(place, in_text), matrix[row].tolist(), row)}"
        f"<p>The same for each of the {T:,} tokens: a row is a token, from left to right is the "
        "text that it looks at. The row of the chosen token is marked.</p>"
        f'<div class="matrix" role="img" aria-label="Attention of {T} tokens to each other" '
        f'style="--row:{row / T};--height:{1 / T}">'
        f'<div style="mask-image:url(data:image/png;base64,{picture})"></div></div>')


# --------------------------------------------------------------------------------------------------
# Logit lens

def lens_html(place: Place) -> str:
    """A table of layers and tokens: the most likely next token after each layer."""
    rows = range(max(0, place.row - LENS_COLUMNS), place.row)
    vocab_size = place.engine.tokenizer.vocab_size
    best = place.trace.lens(list(rows))[..., :vocab_size].softmax(-1).max(-1)  # (L + 1, R)
    names = names_of(place)
    lines = []
    for layer, (probabilities, ids) in enumerate(zip(best.values.tolist(), best.indices.tolist())):
        cells = []
        for row, probability, token in zip(rows, probabilities, ids):
            name = visible(place.engine, token)
            tag = "b" if name == names[row + 1] else "span"  # it is what comes next
            cells.append(cell(f"<{tag}>{escape(name)}</{tag}>", probability,
                              f"{probability:.1%}", chosen=row == rows[-1]))
        lines.append([f"layer {layer}" if layer else "embedding", *cells])
    following = [cell(escape(names[row + 1]), chosen=row == rows[-1]) for row in rows]
    lines.append(["in the text", *following])
    return table_html("Logit lens", ["after", *(names[row] for row in rows)], lines)


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
    largest = values.abs().max().item() or 1.0
    rows = []
    for layer, row in enumerate(values.tolist(), 1):
        cells = [cell(f"{value:+.2f}", value / largest) for value in row]
        rows.append([f"layer {layer}", *cells, cell(f"{sum(row):+.2f}")])
    heads = [f"head {head + 1}" for head in range(parts.heads.size(1))]
    embedding = parts.token + parts.position
    sentence = (
        f"<p>After “{escape(names_of(place)[place.row - 1])}”, the logit of "
        f"“{escape(visible(place.engine, token))}” is {parts.total():+.2f}: "
        f"{embedding.item():+.2f} from the embeddings of token and position, "
        f"{values.sum().item():+.2f} from the layers, "
        f"{parts.final_bias.item():+.2f} from the bias of the final LayerNorm.</p>")
    return sentence + table_html("Contributions", ["", *heads, "bias", "MLP", "sum"], rows)
