"""Turns a conversation into the prompt for the model's next turn.

A model with a chat template gets the conversation in the form it was trained on. A base model has
no template; it continues a transcript, in which each turn stands under the speaker's name.
"""
import bisect
import itertools

from api.schema import ContextExceeded
from generate import Engine
from tokenizer import Tokenizer

SPEAKERS = ("Student", "Teacher")  # the user's and the model's name in a transcript


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


def build_prompt(tokenizer: Tokenizer, messages: list[dict[str, str]], user: str,
                 model: str) -> tuple[str | list[int], int]:
    """The prompt for the model's next turn, and its length in tokens.

    It is a list of ids for a tokenizer with a chat template, else a transcript.
    """
    if tokenizer.chat_template is not None:
        known = [{**message, "content": tokenizer.replace_unknown(message["content"])[0]}
                 for message in messages]
        ids = tokenizer.chat_ids(known)
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

    def prompt_without(left_out: int) -> tuple[str | list[int], int]:
        return build_prompt(engine.tokenizer, system + turns[left_out:], user, model)

    def fits(left_out: int) -> bool:
        _, tokens = prompt_without(left_out)
        return tokens + length <= engine.block_size

    # a shortened conversation with a chat template starts with the user
    beginnings = [i for i, turn in enumerate(turns) if i == 0 or turn["role"] == "user"
                  or engine.tokenizer.chat_template is None]
    # the fewer messages, the shorter the prompt: a binary search encodes few prompts
    first = bisect.bisect_left(beginnings[:-1], True, key=fits)
    left_out = beginnings[first]
    prompt, tokens = prompt_without(left_out)
    if tokens + length <= engine.block_size:
        return prompt, left_out
    raise ContextExceeded(
        f"This message is too long: it takes {tokens:,} tokens and the reply up to {length:,}, but "
        f"the model's context is {engine.block_size:,} tokens. Write a shorter message, choose a "
        "shorter reply, or choose another model.")
