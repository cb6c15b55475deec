"""Damages inputs at random: bytes, and the parts of a JSON document, a pickle or a header.

Every function draws from a random.Random, so that a seed gives the same input again.
"""
import json
import math
import random

# values at which a parser's arithmetic or a type may change
NUMBERS = (0, 1, -1, 2, 3, 7, 255, 256, 65_535, 65_536, 2**31 - 1, 2**31, -2**31, 2**32, 2**53,
           2**63 - 1, 2**63, -2**63, 2**64, 10**30, 10**399, 0.5, -0.5, 1e-300, 1e308, math.inf,
           -math.inf, math.nan, True, False)
TEXTS = ("", "a", " ", "0", "-1", "1e999", "nan", "null", "None", "\0", "\n", "\ud800", "🦊", "é",
         "../x", "/", ".", "a" * 3000, "x.y.z", "__class__", "%s", "{}", "<|endoftext|>")
DEEP = "@deep@"  # dump_json replaces it by one of these, which json.dumps could not write
DEEP_JSON = ("[" * 100_000, "[" * 400 + "]" * 400, '{"a":' * 5000 + "1" + "}" * 5000, "9" * 5000,
             "-", "1e", '"', "NaN")
SNIPPETS = (b"0", b"-1", b"1e999", b"null", b"[", b"]", b"{", b"}", b'"', b",", b":", b"\\",
            b"\\ud800", b"{}", b"9" * 30, b"\0\0\0\0", b"\xff\xff\xff\x7f", b"\xef\xbb\xbf", b"\n")
# opcodes: memo entries, counted strings, calls, frames, and references to functions
HUGE = b"\xff\xff\xff\x7f"
PICKLE_SNIPPETS = (
    b"r\xff\xff\xff\x07", b"r" + HUGE, b"p99999999\n", b"j" + HUGE, b"h\x09", b"q\x09",
    b"B" + HUGE, b"X" + HUGE, b"T" + HUGE, b"\x8b" + HUGE, b"\x8e" + HUGE * 2, b"\x95" + HUGE * 2,
    b"\x8a\xff", b"cos\nsystem\n", b"cnt\n_\n", b"R", b"\x81", b"b", b"o", b"i", b"(", b"t", b"l",
    b"d", b"0", b"2", b"1", b"N", b"s", b"u", b"a", b"e", b"}", b"]", b")", b"\x85", b"\x8f",
    b"\x90", b"\x93", b"\x96", b"Q", b"P1\n", b".", b"I" + b"9" * 30 + b"\n", b"L1L\n", b"F1e999\n",
    b"S'a'\n", b"Vx\n", b"\x80\x63", b"\x82\x01", b"\x94")


# --------------------------------------------------------------------------------------------------
# Bytes

def mutate(content: bytes, source: random.Random, snippets=SNIPPETS) -> bytes:
    """The content with a few random changes, most of them small."""
    changed = bytearray(content)
    for _ in range(source.choice((1, 1, 1, 2, 5, 20))):
        at = source.randrange(len(changed) + 1)
        size = source.choice((1, 1, 2, 4, 8, 100))
        kind = source.random()
        if kind < 0.2 and at < len(changed):
            changed[at] ^= 1 << source.randrange(8)
        elif kind < 0.35:
            changed[at:at + size] = source.randbytes(len(changed[at:at + size]))
        elif kind < 0.5:
            del changed[at:at + size]
        elif kind < 0.6:  # repeat
            changed[at:at] = changed[at:at + size]
        elif kind < 0.7:  # splice
            other = source.randrange(len(changed) + 1)
            changed[at:at + size] = changed[other:other + size]
        elif kind < 0.85:
            changed[at:at] = source.choice(snippets)
        elif kind < 0.95:
            write_integer(changed, at, source)
        else:  # cut off
            del changed[at if at else 1:]
    return bytes(changed)


def write_integer(content: bytearray, at: int, source: random.Random):
    """Overwrites 1 to 8 bytes with an integer at which arithmetic may overflow."""
    width = source.choice((1, 2, 4, 8))
    largest = 2 ** (8 * width) - 1
    value = source.choice((0, 1, largest, largest // 2, largest // 2 + 1, largest - 1,
                           len(content) & largest, 2 ** source.randrange(8 * width)))
    content[at:at + width] = value.to_bytes(width, source.choice(("little", "big")))


# --------------------------------------------------------------------------------------------------
# Documents: dicts, lists and plain values

def mutate_document(document, source: random.Random, values=()):
    """A copy of a document in which a few parts are replaced, removed, renamed or exchanged.

    `values` are replacements that mean something to the parser.
    """
    for _ in range(source.choice((1, 1, 1, 2, 4))):
        document = change_part(document, source, document, values)
    return document


def change_part(part, source: random.Random, document, values):
    if not isinstance(part, dict | list) or not part or source.random() < 0.1:
        return replacement(part, source, document, values)
    changed = part.copy()
    keys = list(part) if isinstance(part, dict) else range(len(part))
    key = source.choice(keys)
    kind = source.random()
    if kind < 0.1:
        del changed[key]
    elif kind < 0.2 and isinstance(part, dict):
        name = source.choice((*TEXTS, str(key)[:-1], f"{key} "))
        changed[name] = changed.pop(key)
    elif kind < 0.2:
        changed.insert(key, changed[key])
    elif kind < 0.3:
        changed[key] = part[source.choice(keys)]
    else:
        changed[key] = change_part(part[key], source, document, values)
    return changed


def replacement(part, source: random.Random, document, values):
    kind = source.random()
    if kind < 0.2 and values:
        return source.choice(values)
    if kind < 0.4 and isinstance(part, int | float):
        return nearby_number(part, source)
    if kind < 0.4 and isinstance(part, str):
        at = source.randrange(len(part) + 1)
        return part[:at] + source.choice(TEXTS) + part[at + source.randrange(2):]
    if kind < 0.55:
        return source.choice(NUMBERS)
    if kind < 0.7:
        return source.choice(TEXTS)
    if kind < 0.75:
        return random_part(document, source)
    return source.choice((None, [], {}, [part], {"a": part}, [[]], [None], [0, 0], {"": 0}, DEEP))


def nearby_number(number, source: random.Random):
    return source.choice((number + 1, number - 1, -number, number * 2, number * 10**6,
                          number // 3, str(number), [number]))


def random_part(document, source: random.Random):
    """A random part of a document, from any level."""
    while isinstance(document, dict | list) and document and source.random() < 0.8:
        values = list(document.values()) if isinstance(document, dict) else document
        document = source.choice(values)
    return document


def dump_json(document, source: random.Random) -> bytes:
    """The document as JSON, in which every DEEP is nested deeply or otherwise extreme."""
    text = json.dumps(document)
    if DEEP in text:
        text = text.replace(f'"{DEEP}"', source.choice(DEEP_JSON))
    return text.encode()


def damaged_json(content: bytes, document, source: random.Random, values=()) -> bytes:
    """Valid JSON, damaged as bytes or as the document that it describes."""
    if source.random() < 0.5:
        return mutate(content, source)
    return dump_json(mutate_document(document, source, values), source)
