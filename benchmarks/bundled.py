"""Measure a bundled model, and write the figures into its README.

    python -m benchmarks.bundled edu data/edu_corpus_bpe-4096 hellaswag_val.jsonl.gz

The figures go between the lines `<!-- figures -->` and `<!-- end of figures -->` of
assets/bundled/<name>/README.md: loss and bits per byte over the whole validation split, HellaSwag
in both protocols, and ten unselected samples. Omit HellaSwag's file for a model of another
language.
"""
import re
from pathlib import Path

import tyro

from benchmarks.validation_loss import measure
from checkpoint import BUNDLED, load_model
from common.errors import UserError, report_user_errors
from generate import Engine
from hellaswag import PROTOCOLS, evaluate, read_examples

FIGURES = re.compile(r"(?<=<!-- figures -->\n).*(?=<!-- end of figures -->)", re.DOTALL)


def main(name: tyro.conf.Positional[str], data: tyro.conf.Positional[Path],
         examples: tyro.conf.Positional[Path | None] = None, prompt: str = ""):
    readme = BUNDLED / name / "README.md"
    if not readme.exists() or not FIGURES.search(readme.read_text()):
        raise UserError(f"{readme} has no lines `<!-- figures -->` and `<!-- end of figures -->`: "
                        "add them where the figures belong.")
    model, tokenizer, info = load_model(f"bundled:{name}")

    # the loss
    result = measure(f"bundled:{name}", data)
    lines = [
        "| figure | value |",
        "| --- | --- |",
        f"| parameters | {info['parameters']:,} |",
        f"| validation loss | {result['loss']:.4f} nats per token over all {result['sequences']:,} "
        f"sequences of {model.config.block_size} tokens in the split; {info['val_loss']:.4f} over "
        "those that training evaluated |",
        f"| bits per byte | **{result['bits_per_byte']:.4f}** |",
    ]

    # HellaSwag
    for protocol in PROTOCOLS if examples else ():
        scores = evaluate(model, tokenizer, read_examples(examples), protocol, show_progress=True)
        score = scores[protocol]
        lines.append(
            f"| HellaSwag, protocol `{protocol}`, {score['n']:,} examples | "
            f"acc {score['acc']:.4f} ± {score['acc_stderr']:.4f}, "
            f"acc_norm {score['acc_norm']:.4f} ± {score['stderr']:.4f} |")

    # samples
    engine = Engine(model, tokenizer)
    lines += ["", "Ten samples, not selected: temperature 0.8, top-k 50, at most 120 tokens, seeds "
              f"0 to 9, {f'after `{prompt}`' if prompt else 'without a prompt'}."]
    for seed in range(10):
        (text,) = engine.generate(prompt, temperature=0.8, top_k=50, max_new_tokens=120, seed=seed)
        lines += ["", f"{seed}.", "", *(f"    {line}" for line in text.splitlines())]

    block = "\n".join(lines) + "\n"
    readme.write_text(FIGURES.sub(lambda _: block, readme.read_text()))
    print(block)


if __name__ == "__main__":
    with report_user_errors():
        tyro.cli(main)
