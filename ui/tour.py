"""The guided tour in Look inside: eight steps from text to loss, each with a view of the model."""
import gradio as gr
import numpy as np
import torch
import torch.nn.functional as F

from engine.sampling import sample
from ui import layers
from ui.layers import cell
from ui.models import Models
from ui.reading import SAMPLE, Place, in_text, place_in, probabilities, visible
from ui.settings import HTML, QUIET, read_sections

ROWS = 8  # tokens in a table
TEMPERATURES = [0.3, 0.7, 1.0, 1.5]
TOP_P = 0.9
DRAWS = 100

# --------------------------------------------------------------------------------------------------
# The views, each of the end of the text

def tokens_view(place: Place) -> str:
    numbers = [str(i) for i in place.trace.ids]
    return HTML.text(layers.names_of(place, in_text), [0.3] * len(numbers), numbers)


def embedding_view(place: Place) -> str:
    """The tokens whose embeddings are most similar, for the last tokens of the text."""
    vocab_size = place.engine.tokenizer.vocab_size
    wte = F.normalize(place.engine.model.transformer.wte.weight[:vocab_size].detach().float())
    rows = []
    for i in list(dict.fromkeys(place.trace.ids[::-1]))[:ROWS]:
        best = (wte @ wte[i]).topk(6)  # the first one is the token itself
        cells = [cell(visible(place.engine, other), similarity, f"{similarity:.2f}")
                 for similarity, other in zip(best.values.tolist()[1:], best.indices.tolist()[1:])]
        rows.append([visible(place.engine, i), *cells])
    return HTML.table("Similar tokens", ["token", "most similar", "", "", "", ""], rows)


def attention_view(place: Place) -> str:
    """The head that looks most at one token, leaving out the first one and the last two."""
    attention = place.trace.attention[:, :, -1].clone()  # (L, nh, T)
    attention[:, :, [0, -2, -1]] = 0
    layer, head, _ = (int(i) + 1 for i in torch.unravel_index(attention.argmax(), attention.shape))
    return f"<p>Layer {layer}, head {head}.</p>{layers.attention_html(place, layer, head)}"


def mlp_view(place: Place) -> str:
    """What the attention and the MLP of each layer add to the most likely token."""
    [(name, best)] = place.likeliest(place.logits(), 1).items()
    parts = layers.contributions_to(place, best)
    values = torch.stack([parts.heads.sum(1) + parts.attention_bias, parts.mlp], 1)  # (L, 2)
    return HTML.table("Attention and MLP", ["", "attention", "MLP"], layers.signed_rows(values),
                      before=f"Added to the score of “{name}”:")


def logits_view(place: Place) -> str:
    logits = place.logits()
    p = probabilities(logits)
    rows = [[name, cell(f"{logits[i]:.2f}"), cell(f"{p[i]:.1%}", p[i])]
            for name, i in place.likeliest(logits, ROWS).items()]
    return HTML.table("Logits", ["next token", "logit", "probability"], rows)


def temperature_view(place: Place) -> str:
    logits = place.logits()
    columns = [probabilities(logits, temperature) for temperature in TEMPERATURES]
    rows = [[name, *(cell(f"{p[i]:.1%}", p[i]) for p in columns)]
            for name, i in place.likeliest(logits, ROWS).items()]
    return HTML.table("Temperature", ["temperature", *map(str, TEMPERATURES)], rows)


def sampling_view(place: Place) -> str:
    """How often each token is sampled."""
    logits = place.logits()
    p = probabilities(logits, top_p=TOP_P)
    uniforms = np.random.default_rng(0).random(DRAWS)
    drawn = [sample(logits, uniform, top_p=TOP_P) for uniform in uniforms]
    rows = [[name, cell(f"{p[i]:.1%}", p[i]), cell(str(drawn.count(i)), drawn.count(i) / DRAWS)]
            for name, i in place.likeliest(logits, ROWS).items()]
    head = ["next token", f"top-p {TOP_P}", f"in {DRAWS} draws"]
    return HTML.table("Sampling", head, rows,
                      after=f"Tokens to choose from: {np.count_nonzero(p):,}.")


def loss_view(place: Place) -> str:
    ids = place.trace.ids
    logits = place.lens(list(range(len(ids) - 1)))[-1]  # (T - 1, V)
    losses = F.cross_entropy(logits.cpu(), torch.tensor(ids[1:]), reduction="none")  # (T - 1,)
    weights = (-losses / losses.max()).tolist()
    notes = [f"{loss:.1f}" for loss in losses.tolist()]
    text = HTML.text(layers.names_of(place, in_text)[1:], weights, notes)
    return f"{text}<p>The mean, which is the loss of this text: {losses.mean():.2f} nats.</p>"


# --------------------------------------------------------------------------------------------------
# The steps

VIEWS = [tokens_view, embedding_view, attention_view, mlp_view, logits_view, temperature_view,
         sampling_view, loss_view]
STEPS = list(read_sections("tour.md").items())  # a title and a paragraph for each view


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
    shown = start.click(lambda _, name: show(models, 0, name), **options)
    shown.then(appear(True), None, [panel, start], **QUIET)
    close.click(appear(False), None, [panel, start], **QUIET)
    for event, by in (back.click, -1), (forward.click, 1), (model.change, 0):
        event(move(by), **options)


def show(models: Models, number: int, model: str):
    """The step's number, paragraph and view, and which buttons can be used."""
    place = place_in(models, SAMPLE, model, len(SAMPLE) + 1)
    title, paragraph = STEPS[number]
    return (number, f"### {number + 1} of {len(STEPS)}: {title}\n\n{paragraph}",
            VIEWS[number](place),
            gr.update(interactive=number > 0), gr.update(interactive=number < len(STEPS) - 1))
