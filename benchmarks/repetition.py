"""What a repetition penalty does to the chat model: fewer repetitions, and less of the subject.

    python -m benchmarks.repetition    # ten minutes

A penalty makes all words that were used before less likely, those of the subject too. For several
penalties the model answers the lines of chat_lines.txt, each with SEEDS. The table goes between
the lines `<!-- repetition -->` and `<!-- end of repetition -->` of assets/bundled/chat/README.md.
"""
import itertools
import re

from benchmarks.bundled import chat_lines, converse
from benchmarks.pages import write_lines
from checkpoint import BUNDLED, load_model
from generate import Engine

PENALTIES = (1.0, 1.05, 1.1, 1.15)
SEEDS = range(100, 108)
SETTINGS = {"temperature": 0.7, "top_p": 0.9, "max_new_tokens": 60}
# words that do not show the subject
COMMON = set("""
    a an the i you he she it we they is are was were be am to of and or in on at for with do does
    did have has had what who how why when where that this so not my your me if would could can
    will like just""".split())


def main():
    model, tokenizer, _ = load_model("bundled:chat")
    engine = Engine(model, tokenizer)
    table = ["| repetition penalty | pairs of words that a turn repeats "
             "| turns with a word from the user's lines |", "| --- | --- | --- |"]
    for penalty in PENALTIES:
        settings = {**SETTINGS, "repetition_penalty": penalty}
        conversations = [converse(engine, lines, seed, settings)
                         for seed in SEEDS for lines in chat_lines()]
        repeated, on_subject = count(conversations)
        table.append(f"| {penalty:g} | {repeated:.1%} | {on_subject:.0%} |")
        print(table[-1], flush=True)
    write_lines(BUNDLED / "chat" / "README.md", "repetition", table)


def count(conversations: list[list[dict[str, str]]]) -> tuple[float, float]:
    """(share of pairs of neighboring words that the same turn had before, share of the model's
    turns with a word that an earlier line of the user has)."""
    pairs = repeated = turns = on_subject = 0
    for messages in conversations:
        subject = set()
        for message in messages:
            words = re.findall(r"[a-z']+", message["content"].lower())
            if message["role"] == "user":
                subject |= set(words) - COMMON
                continue
            turn_pairs = list(itertools.pairwise(words))
            pairs += len(turn_pairs)
            repeated += len(turn_pairs) - len(set(turn_pairs))
            turns += 1
            on_subject += not subject.isdisjoint(words)
    return repeated / pairs, on_subject / turns


if __name__ == "__main__":
    main()
