"""Measure a bundled model, and write the figures into its README.

    python -m benchmarks.bundled edu data/edu_corpus_bpe-4096 hellaswag_val.jsonl.gz

The figures go between the lines `<!-- figures -->` and `<!-- end of figures -->` of
assets/bundled/<name>/README.md: loss and bits per byte over the whole validation split, HellaSwag
in both protocols (if its file is given), bits per byte of `--text` beside the model `--against`,
the share of written words that occur in `--corpus`, and ten samples that nobody selected. For a
model with a chat template the samples are conversations, with the lines of chat_lines.txt.
"""
import json
import re
from collections.abc import Iterator
from pathlib import Path

import tyro

from benchmarks.validation_loss import measure
from checkpoint import BUNDLED, load_model
from common.errors import UserError, report_user_errors
from engine.likelihood import perplexity
from generate import Engine
from hellaswag import PROTOCOLS, evaluate, read_examples

FIGURES = re.compile(r"(?<=<!-- figures -->\n).*(?=<!-- end of figures -->)", re.DOTALL)
CHAT_LINES = Path(__file__).with_name("chat_lines.txt")


def main(name: tyro.conf.Positional[str], data: tyro.conf.Positional[Path],
         examples: tyro.conf.Positional[Path | None] = None, prompt: str = "",
         text: Path | None = None, against: str = "bundled:edu", corpus: Path | None = None,
         temperature: float = 0.7, top_p: float = 0.9, max_new_tokens: int = 150):
    readme = BUNDLED / name / "README.md"
    if not readme.exists() or not FIGURES.search(readme.read_text()):
        raise UserError(f"{readme} has no lines `<!-- figures -->` and `<!-- end of figures -->`: "
                        "add them where the figures belong.")
    model, tokenizer, info = load_model(f"bundled:{name}")
    engine = Engine(model, tokenizer)
    settings = {"temperature": temperature, "top_p": top_p, "max_new_tokens": max_new_tokens}

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

    # a text, by this model and another
    if text:
        other, other_tokenizer, _ = load_model(against)
        content = text.read_text(encoding="utf-8")
        ours = perplexity(engine.packed, tokenizer, content)["bits_per_byte"]
        theirs = perplexity(other, other_tokenizer, content)["bits_per_byte"]
        lines.append(f"| bits per byte of `{text.name}` | **{ours:.4f}**, which is "
                     f"{ours / theirs:.2f} of the {theirs:.4f} of `{against}` |")

    # the words that it writes
    if corpus:
        known = {word for line in open(corpus, encoding="utf-8")
                 for word in words(json.loads(line)["text"])}
        written = [word for sample in engine.generate(prompt, n=32, seed=1, **settings)
                   for word in words(sample)]
        share = sum(word in known for word in written) / len(written)
        lines.append(f"| written words found in its corpus | {share:.2%} of {len(written):,} |")

    # HellaSwag
    for protocol in PROTOCOLS if examples else ():
        scores = evaluate(model, tokenizer, read_examples(examples), protocol, show_progress=True)
        score = scores[protocol]
        lines.append(
            f"| HellaSwag, protocol `{protocol}`, {score['n']:,} examples | "
            f"acc {score['acc']:.4f} ± {score['acc_stderr']:.4f}, "
            f"acc_norm {score['acc_norm']:.4f} ± {score['stderr']:.4f} |")

    # samples
    how = f"temperature {temperature}, top-p {top_p}, at most {max_new_tokens} tokens"
    if tokenizer.chat_template:
        lines += ["", f"Ten conversations, not selected: {how}."]
        samples = conversations(engine, settings)
    else:
        start = f"after `{prompt}`" if prompt else "without a prompt"
        lines += ["", f"Ten samples, not selected: {how}, seeds 0 to 9, {start}."]
        samples = (engine.generate(prompt, seed=seed, **settings)[0] for seed in range(10))
    for number, sample in enumerate(samples):
        lines += ["", f"{number}.", "", *(f"    {line}" for line in sample.splitlines())]

    block = "\n".join(lines) + "\n"
    readme.write_text(FIGURES.sub(lambda _: block, readme.read_text()))
    print(block)


def words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def conversations(engine: Engine, settings: dict) -> Iterator[str]:
    """Conversations in which the user says the lines of chat_lines.txt, one paragraph each."""
    for seed, paragraph in enumerate(CHAT_LINES.read_text().strip().split("\n\n")):
        messages = []
        for line in paragraph.splitlines():
            messages.append({"role": "user", "content": line})
            ids = engine.tokenizer.chat_ids(messages)
            (reply,) = engine.generate(ids, seed=seed, **settings)
            messages.append({"role": "assistant", "content": reply.strip()})
        yield "\n".join(f"{message['role']}: {message['content']}" for message in messages)


if __name__ == "__main__":
    with report_user_errors():
        tyro.cli(main)
