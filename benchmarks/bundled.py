"""What is said of a bundled model, measured and written into its README.

    python -m benchmarks.bundled edu data/edu_corpus_bpe-4096 hellaswag_val.jsonl.gz

Between the lines `<!-- figures -->` and `<!-- end of figures -->` of assets/bundled/<name>/README.md: loss and bits a byte
over the whole validation split, HellaSwag in both protocols, ten samples as they came, of seeds 0 to 9. For a model of
another language leave HellaSwag's file out.
"""


import re
from pathlib import Path

import tyro

from benchmarks.validation_loss import measure
from checkpoint import BUNDLED, load_model
from common.errors import UserError, report_user_errors
from generate import Engine
from hellaswag import PROTOCOLS, evaluate, read_examples

BETWEEN = re.compile(r"(?<=<!-- figures -->\n).*(?=<!-- end of figures -->)", re.DOTALL)


def main(name: tyro.conf.Positional[str], data: tyro.conf.Positional[Path], examples: tyro.conf.Positional[Path | None] = None,
         prompt: str = ""):
    readme = BUNDLED / name / "README.md"
    if not readme.exists() or not BETWEEN.search(readme.read_text()):
        raise UserError(f"{readme} has no place for the figures: see the head of this file.")
    model, tokenizer, info = load_model(f"bundled:{name}")
    found = measure(f"bundled:{name}", data)
    lines = ["| figure | value |", "| --- | --- |", f"| parameters | {info['parameters']:,} |",
             f"| validation loss | {found['loss']:.4f} nats a token, over all {found['sequences']:,} sequences of "
             f"{model.config.block_size} tokens that the split holds; {info['val_loss']:.4f} of those that training measured |",
             f"| bits a byte | **{found['bits_per_byte']:.4f}** |"]
    for protocol in PROTOCOLS if examples else ():
        result = evaluate(model, tokenizer, read_examples(examples), protocol, show_progress=True)[protocol]
        lines.append(f"| HellaSwag, protocol `{protocol}`, {result['n']:,} examples | acc {result['acc']:.4f} ± "
                     f"{result['acc_stderr']:.4f}, acc_norm {result['acc_norm']:.4f} ± {result['stderr']:.4f} |")
    engine = Engine(model, tokenizer)
    lines += ["", "Ten samples, none left out: temperature 0.8, top-k 50, at most 120 tokens, seeds 0 to 9, after "
              + (f"`{prompt}`." if prompt else "nothing.")]
    for seed in range(10):
        (text,) = engine.generate(prompt, temperature=0.8, top_k=50, max_new_tokens=120, seed=seed)
        lines += ["", f"{seed}.", "", *(f"    {line}" for line in text.splitlines())]
    block = "\n".join(lines) + "\n"
    readme.write_text(BETWEEN.sub(lambda _: block, readme.read_text()))
    print(block)


if __name__ == "__main__":
    with report_user_errors():
        tyro.cli(main)
