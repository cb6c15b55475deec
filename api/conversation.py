"""Turns a conversation into the prompt for the model's next turn.

A model with a chat template gets the conversation in the form it was trained on. A base model has
no template; it continues a transcript, in which each turn stands under the speaker's name.
"""
import bisect
import functools
import itertools
import re
from collections.abc import Iterable

from jinja2.sandbox import ImmutableSandboxedEnvironment

from api.schema import ContextExceeded
from common.errors import UserError
from generate import Engine
from tokenizer import Tokenizer

SPEAKERS = ("Student", "Teacher")  # the user's and the model's name in a transcript

# chat templates, with the settings of transformers
TEMPLATES = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
compile_template = functools.lru_cache(TEMPLATES.from_string)


def transcript(messages: list[dict[str, str]], user: str, model: str) -> str:
    """The text that a base model continues: each turn under its speaker's name, then the name of
    the model's speaker. System messages stand without a name."""
    names = {"user": f"{user}:\n", "assistant": f"{model}:\n", "system": ""}
    turns = [f"{names[message['role']]}{message['content']}\n\n" for message in messages]
    return "".join(turns) + f"{model}:\n"


def turn_ends(tokenizer: Tokenizer, user: str, model: str) -> tuple[str, ...]:
    """The stop strings of a turn. With a chat template the model ends its turn itself, with
    `<|endoftext|>`."""
    if tokenizer.chat_template is not None:
        return ()
    # with the blank line that precedes a name, so that a reply does not end with it
    return tuple(f"{breaks}{name}:" for name in (user, model) for breaks in ("\n\n", "\n"))


def chat_ids(tokenizer: Tokenizer, messages: list[dict[str, str]],
             add_generation_prompt=True) -> list[int]:
    """The ids of a conversation, formatted with the tokenizer's chat template.

    The template can write special tokens; messages cannot: special tokens are removed from them.
    Otherwise the ids are those of `apply_chat_template` in transformers.
    """
    if tokenizer.chat_template is None:
        raise UserError("This model's tokenizer has no chat template: "
                        "set chat_template in its tokenizer_config.json.")
    end_of_text = "" if tokenizer.eot is None else tokenizer.decode([tokenizer.eot])
    special = {tokenizer.decode([i]): i for i in tokenizer.special_ids}
    if end_of_text:
        special[end_of_text] = tokenizer.eot

    # render the template
    try:
        text = compile_template(tokenizer.chat_template).render(
            messages=remove_words(special, messages),
            add_generation_prompt=add_generation_prompt,
            bos_token=end_of_text, eos_token=end_of_text)
    except Exception as error:  # a template can raise any exception
        raise UserError(f"The chat template failed ({type(error).__name__}: {error}): "
                        "correct chat_template in tokenizer_config.json.") from None

    # encode the text between special tokens; the longest match wins, as in transformers
    longest_first = sorted(special, key=len, reverse=True)
    pattern = "|".join(map(re.escape, longest_first)) or "(?!)"  # (?!) never matches
    ids = []
    for piece in re.split(f"({pattern})", text):
        ids += [special[piece]] if piece in special else tokenizer.encode(piece)
    return ids


def remove_words(words: Iterable[str], value):
    """Remove the words from a string, or from all strings in nested lists and dicts.

    Words that a removal puts together are removed, too.
    """
    if isinstance(value, dict):
        return {key: remove_words(words, item) for key, item in value.items()}
    if isinstance(value, list):
        return [remove_words(words, item) for item in value]
    if isinstance(value, str) and any(word in value for word in words):
        kept = []  # characters
        for char in value:
            kept.append(char)
            for word in words:
                if char == word[-1] and kept[-len(word):] == list(word):
                    del kept[-len(word):]
        return "".join(kept)
    return value


def build_prompt(tokenizer: Tokenizer, messages: list[dict[str, str]], user: str,
                 model: str) -> tuple[str | list[int], int]:
    """The prompt for the model's next turn, and its length in tokens.

    It is a list of ids for a tokenizer with a chat template, else a transcript.
    """
    if tokenizer.chat_template is not None:
        known = [{**message, "content": tokenizer.replace_unknown(message["content"])[0]}
                 for message in messages]
        ids = chat_ids(tokenizer, known)
        return ids, len(ids)
    text = transcript(messages, user, model)
    known, _ = tokenizer.replace_unknown(text)
    return text, len(tokenizer.encode(known))


def fit_prompt(engine: Engine, messages: list[dict[str, str]], user: str, model: str,
               length: int) -> tuple[str | list[int], int]:
    """The prompt, and how many of the oldest messages it leaves out so that `length` new tokens
    fit into the context. System messages at the beginning stay.

    Raises ContextExceeded if not even the last message fits.
    """
    system = list(itertools.takewhile(lambda message: message["role"] == "system", messages))
    turns = messages[len(system):]

    def prompt_without(left_out: int) -> str | list[int] | None:
        """The prompt without the oldest messages, or None if it does not fit."""
        kept = system + turns[left_out:]
        # encoding takes time, so do not encode what cannot fit; each message has its speaker, too
        if sum(len(message["content"]) + 1 for message in kept) > engine.max_chars:
            return None
        prompt, tokens = build_prompt(engine.tokenizer, kept, user, model)
        return prompt if tokens + length <= engine.block_size else None

    # a shortened conversation with a chat template starts with the user
    beginnings = [i for i, turn in enumerate(turns) if i == 0 or turn["role"] == "user"
                  or engine.tokenizer.chat_template is None]
    # the fewer messages, the shorter the prompt: a binary search encodes few prompts
    first = bisect.bisect_left(beginnings[:-1], True, key=lambda i: prompt_without(i) is not None)
    left_out = beginnings[first]
    prompt = prompt_without(left_out)
    if prompt is None:
        raise ContextExceeded(
            f"This message is too long: the model's context is {engine.block_size:,} tokens, of "
            f"which the reply takes up to {length:,}. Write a shorter message, choose a shorter "
            "reply, or choose another model.")
    return prompt, left_out
