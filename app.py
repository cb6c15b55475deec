"""The web page: write, chat and look inside a model in the browser.

    python app.py                                            # http://127.0.0.1:7860
    python app.py --model log/shakespeare-char-cpu --port 8000

Each tab is a file in ui/. All tabs share the sampling engines of `Models`, and so does OpenAI's API
under /v1 (serve.py). The page loads nothing from other servers and sends no telemetry.
"""
import dataclasses
import html
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from types import MethodType

# Gradio reads these when it is imported.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
# Gradio aggregates its recent events in the background, which costs CPU time: keep one event,
# and practically never aggregate.
os.environ["GRADIO_ANALYTICS_MAX_EVENTS"] = "1"
os.environ["GRADIO_ANALYTICS_CACHE_FREQUENCY"] = "1000000000"

from common.program import report_user_errors

import gradio as gr
import tyro
from starlette.middleware import Middleware

import report
import serve
from api.guard import Access, Guard
from api.schema import to_request_error
from engine.packed import use_allowed_cores
from generate import Dtype
from ui import about, chat, compare, look, reading, training, write
from ui.models import Models
from ui.settings import QUIET
from ui.theme import THEME

STATIC = Path(__file__).parent / "ui" / "static"
MAX_SESSIONS = 200  # visitors whose page state is kept, 150 kB each; Gradio's default is 10,000
TITLE = """# GPT-2 From Scratch
Small language models that write, and everything it takes to build one, in plain PyTorch."""
TABS = {"Write": write, "Chat": chat, "Look inside": look, "Compare": compare, "Training": training,
        "About": about}
# the functions that gradio_client can call by name, see docs/api.md
API = {"generate": write.write, "chat": chat.chat, "compare": compare.compare,
       "timeline": compare.timeline, "models": Models.list_names}


@dataclasses.dataclass
class AppConfig:
    """Serves the page."""

    # A Hugging Face Space sets these environment variables.
    model: str | None = os.environ.get("MODEL")
    """bundled[:name], a run folder, a .pt file, a Hugging Face folder or a Hub id. Default: the
    newest run, or the bundled model if there is none."""
    host: str = os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1")
    """Address to listen on; 0.0.0.0 accepts connections from other machines."""
    port: int = int(os.environ.get("GRADIO_SERVER_PORT", "7860"))
    share: bool = False
    """Create a public link through Gradio's servers."""
    device: str = "auto"
    """auto, cuda, mps or cpu."""
    dtype: Dtype = "auto"
    """auto is bfloat16 on CUDA (float16 on older GPUs); on a CPU int8 for models with 20 million
    parameters or more, and float32 for smaller ones."""
    access: tyro.conf.OmitArgPrefixes[Access] = dataclasses.field(default_factory=Access)


class Page(gr.Blocks):
    """Gradio's Blocks, which show a visitor the error that ended an event.

    Gradio would log an error's message, which may quote what the visitor sent.
    """

    async def process_api(self, *arguments, **options):
        try:
            return await super().process_api(*arguments, **options)
        except gr.Error as error:  # Gradio's own: a value is out of range, for example
            error.print_exception = False
            raise
        except Exception as error:
            # Gradio reads it as HTML, so what it quotes from the visitor is escaped
            message = html.escape(str(to_request_error(error)), quote=False)
            raise gr.Error(message, print_exception=False) from None


def build(models: Models) -> gr.Blocks:
    """Builds the page: a title and the tabs."""
    with Page(title="GPT-2 From Scratch", analytics_enabled=False,
              delete_cache=(3600, 3600)) as page:
        gr.Markdown(TITLE, elem_id="title")
        built = {}
        with gr.Tabs() as tabs:
            for name, tab in TABS.items():
                with gr.Tab(name, id=name):
                    built[name] = tab.build(models)
        for name, function in API.items():
            offer(page, MethodType(function, models), name)
        connect(page, models, tabs, built)
    return page


def offer(page: gr.Blocks, function: Callable, name: str):
    """Makes a function part of the page's API, under a name."""
    gr.api(function, api_name=name, concurrency_limit=None)
    # Gradio labels the values 1st, 2nd, …: name them as the function does
    *_, endpoint = page.fns.values()
    for value, parameter in zip(endpoint.inputs, inspect.signature(function).parameters):
        value.label = parameter
    endpoint.outputs[0].label = "result"


def connect(page: gr.Blocks, models: Models, tabs: gr.Tabs, built: dict[str, tuple]):
    """Connects the tabs: Write opens its text in Look inside, and Training its model in Write.

    The lists of models are refreshed when a model has been trained, and whenever the page opens.
    """
    text, model, look_button = built["Write"]
    look_text, look_model = built["Look inside"]
    write_button, trained = built["Training"]
    lists = [box for box in page.blocks.values()
             if isinstance(box, gr.Dropdown) and box.label.startswith("Model")]

    def look_inside(text: str, model: str):
        return (text[-reading.MAX_TEXT:], gr.Dropdown(models.list_names(), value=model),
                gr.Tabs(selected="Look inside"))

    def write_with(name: str):
        prompt = report.read_config(name)["sample_prompt"]
        return gr.Dropdown(models.list_names(), value=name), prompt, gr.Tabs(selected="Write")

    def refresh():
        names, with_checkpoints = models.list_names(), models.list_with_checkpoints()
        return [gr.Dropdown(with_checkpoints if "compare" in box.elem_id else names)
                for box in lists]

    look_button.click(look_inside, [text, model], [look_text, look_model, tabs], **QUIET)
    write_button.click(write_with, trained, [model, text, tabs], **QUIET)
    gr.on([page.load, trained.change], refresh, None, lists, **QUIET)


def main(config: AppConfig, **launch_options) -> gr.Blocks:
    """Starts the server and returns the page; `launch_options` go to Gradio's `launch`."""
    serve.check_port(config.host, config.port)
    use_allowed_cores()
    access = config.access
    if access.allow_host or access.allow_origin:
        # a reverse proxy's visitors can look like this machine's own
        os.environ.setdefault("ALLOW_TRAINING", "0")
    models = Models(config.model, config.device, config.dtype)
    page = build(models)
    models.load_in_background()
    page.queue(max_size=64)
    api = serve.routes(models.names, models.engine)
    if config.share:  # the public link is a name below gradio.live
        access = dataclasses.replace(access, allow_host=(*access.allow_host, "*.gradio.live"))
    guard = Middleware(Guard, access=access, host=config.host)
    # page.js first: the others add to what it defines
    scripts = sorted(STATIC.glob("*.js"), key=lambda path: (path.stem != "page", path.stem))
    head = "".join(f"<script>{path.read_text(encoding='utf-8')}</script>" for path in scripts)
    try:
        page.launch(server_name=config.host, server_port=config.port, share=config.share,
                    theme=THEME, head=head, css_paths=sorted(STATIC.glob("*.css")),
                    footer_links=["api"], ssr_mode=False, run_history=False,
                    enable_monitoring=False, max_threads=100, state_session_capacity=MAX_SESSIONS,
                    max_file_size=training.MAX_BYTES,
                    app_kwargs={"routes": api.routes, "middleware": [guard]}, **launch_options)
    except KeyboardInterrupt:  # Gradio closes the server only if it is already waiting for Ctrl-C
        page.close(verbose=False)
        raise
    return page


if __name__ == "__main__":
    with report_user_errors():
        main(tyro.cli(AppConfig))
