"""Measure a bundled model, and write the figures into its README.

    python -m benchmarks.bundled edu data/edu_corpus_bpe-4096 hellaswag_val.jsonl.gz

The figures go between the lines `<!-- figures -->` and `<!-- end of figures -->` of
assets/bundled/<name>/README.md: loss and bits per byte over the whole validation split, bits per
byte of `--text` beside the model `--against`, the share of written words that occur in `--corpus`,
HellaSwag in both protocols (if its file is given), and ten samples that nobody selected. For a
model with a chat template the samples are conversations, with the lines of chat_lines.txt.
"""
import json
import re
from collections.abc import Iterator
from pathlib import Path

from common.program import report_user_errors

import tyro

from api.conversation import chat_ids
from benchmarks.pages import write_lines
from benchmarks.validation_loss import measure
from checkpoint import BUNDLED, load_model
from engine.likelihood import perplexity
from generate import Engine
from hellaswag import PROTOCOLS, evaluate, read_examples

CHAT_LINES = Path(__file__).with_name("chat_lines.txt")


def main(name: tyro.conf.Positional[str], data: tyro.conf.Positional[Path],
         examples: tyro.conf.Positional[Path | None] = None, prompt: str = "",
         text: Path | None = None, against: str = "bundled:edu", corpus: Path | None = None,
         temperature: float = 0.7, top_k: int | None = None, top_p: float = 0.9,
         repetition_penalty: float = 1.0, max_new_tokens: int = 150):
    model, tokenizer, info = load_model(f"bundled:{name}")
    engine = Engine(model, tokenizer)
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p,
                "repetition_penalty": repetition_penalty, "max_new_tokens": max_new_tokens}
    lines = ["| figure | value |", "| --- | --- |", *loss_rows(info, data)]
    if text:
        lines.append(text_row(engine, text, against))
    if corpus:
        lines.append(words_row(engine, corpus, prompt, settings))
    if examples:
        lines += hellaswag_rows(engine, read_examples(examples))
    lines += sample_lines(engine, prompt, settings)
    print("\n".join(lines))
    write_lines(BUNDLED / name / "README.md", "figures", lines)


def loss_rows(info: dict, data: Path) -> list[str]:
    """The rows on the validation split."""
    result = measure(info["name"], data)
    return [
        f"| parameters | {info['parameters']:,} |",
        f"| validation loss | {result['loss']:.4f} nats per token over all {result['sequences']:,} "
        f"sequences of {result['tokens'] // result['sequences']} tokens in the split; "
        f"{info['val_loss']:.4f} over those that training evaluated |",
        f"| bits per byte | **{result['bits_per_byte']:.4f}** |"]


def text_row(engine: Engine, path: Path, against: str) -> str:
    """The row on a text, by this model and by another."""
    other, other_tokenizer, _ = load_model(against)
    text = path.read_text(encoding="utf-8")
    ours = perplexity(engine.packed, engine.tokenizer, text)["bits_per_byte"]
    theirs = perplexity(other, other_tokenizer, text)["bits_per_byte"]
    return (f"| bits per byte of `{path.name}` | **{ours:.4f}**, which is {ours / theirs:.2f} of "
            f"the {theirs:.4f} of `{against}` |")


def words_row(engine: Engine, corpus: Path, prompt: str, settings: dict) -> str:
    """The row on the words that the model writes."""
    with open(corpus, encoding="utf-8") as file:
        known = {word for line in file for word in words(json.loads(line)["text"])}
    samples = engine.generate(prompt, n=32, seed=1, **settings)
    written = [word for sample in samples for word in words(sample)]
    share = sum(word in known for word in written) / len(written)
    return f"| written words found in its corpus | {share:.2%} of {len(written):,} |"


def words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def hellaswag_rows(engine: Engine, examples: list[dict]) -> Iterator[str]:
    """A row for each protocol of HellaSwag."""
    for protocol in PROTOCOLS:
        scores = evaluate(engine.model, engine.tokenizer, examples, protocol, show_progress=True)
        score = scores[protocol]
        yield (f"| HellaSwag, protocol `{protocol}`, {score['n']:,} examples | "
               f"acc {score['acc']:.4f} ± {score['acc_stderr']:.4f}, "
               f"acc_norm {score['acc_norm']:.4f} ± {score['stderr']:.4f} |")


def sample_lines(engine: Engine, prompt: str, settings: dict) -> list[str]:
    """Ten samples, or ten conversations with a model that has a chat template."""
    if engine.tokenizer.chat_template:
        title = f"Ten conversations, not selected: {describe(settings)}."
        samples = conversations(engine, settings)
    else:
        start = f"after `{prompt}`" if prompt else "without a prompt"
        title = f"Ten samples, not selected: {describe(settings)}, seeds 0 to 9, {start}."
        samples = (engine.generate(prompt, seed=seed, **settings)[0] for seed in range(10))
    lines = ["", title]
    for number, sample in enumerate(samples):
        lines += ["", f"{number}.", "", *(f"    {line}" for line in sample.splitlines())]
    return lines


def describe(settings: dict) -> str:
    """The settings as text, without those that change nothing."""
    parts = [f"temperature {settings['temperature']}"]
    if settings["top_k"]:
        parts.append(f"top-k {settings['top_k']}")
    if settings["top_p"] < 1:
        parts.append(f"top-p {settings['top_p']}")
    parts.append(f"at most {settings['max_new_tokens']} tokens")
    if settings["repetition_penalty"] != 1:
        parts.append(f"repetition penalty {settings['repetition_penalty']}")
    return ", ".join(parts)


def conversations(engine: Engine, settings: dict) -> Iterator[str]:
    """A conversation for each paragraph of chat_lines.txt."""
    for seed, lines in enumerate(chat_lines()):
        messages = converse(engine, lines, seed, settings)
        yield "\n".join(f"{message['role']}: {message['content']}" for message in messages)


def chat_lines() -> list[list[str]]:
    """What the user says, for each conversation."""
    paragraphs = CHAT_LINES.read_text(encoding="utf-8").strip().split("\n\n")
    return [paragraph.splitlines() for paragraph in paragraphs]


def converse(engine: Engine, lines: list[str], seed: int, settings: dict) -> list[dict[str, str]]:
    """The messages of a conversation in which the user says these lines."""
    messages = []
    for line in lines:
        messages.append({"role": "user", "content": line})
        ids = chat_ids(engine.tokenizer, messages)
        (reply,) = engine.generate(ids, seed=seed, **settings)
        messages.append({"role": "assistant", "content": reply.strip()})
    return messages


if __name__ == "__main__":
    with report_user_errors():
        tyro.cli(main)
