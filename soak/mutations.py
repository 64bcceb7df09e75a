"""Valid files made invalid: structured mutations, drawn from a `random.Random`."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

Mutate = Callable[[bytes, Random], bytes]

# No file that is made is longer.
LONGEST = 1 << 17
# Between the files of an input that is several.
BETWEEN = b"\n%%%%%%\n"

# Values that are hard to read, as they stand in JSON.
_HARD = (
    *("null", "true", "false", "0", "-1", "1", "3", "1.5", "-0.0", "1e-320", "1e999", "-1e999"),
    *("NaN", "Infinity", "-Infinity", "2147483648", "9223372036854775808", "18446744073709551616"),
    *("1" * 400, "9" * 5000, '""', '" "', '"\\u0000"', '"\\ud800"', '"\\udc00 x"', '"..", ".."'),
    *('".."', '"../../x"', '"/"', '"a/b"', '"é"', '"\\u2028"', '"%s"', '"' + "a" * 3000 + '"'),
    *("[]", "{}", "[[]]", '[""]', "[null]", "[0, 1]", '{"a": 1}', '{"": {}}', "[" * 40 + "]" * 40),
    *("[" * 101 + "]" * 101, "[" * 1200 + "]" * 1200, '{"a":' * 200 + "1" + "}" * 200),
    *("[" + "0," * 500 + "0]", '["' + '","'.join("abcdefghij" * 20) + '"]'),
)
# Pieces of regular expressions, names of modules and templates.
_PIECES = (
    *(
        ".*",
        "(",
        ")",
        ")*",
        ")+",
        "|",
        "[",
        "]",
        "\\",
        "\\d",
        "$",
        "^",
        "?",
        "(?P<x>",
        "(?!",
        "{2,}",
    ),
    *("layers", ".", "k_proj", "v_proj", "down_proj", "mlp", "model", "0", "1", "self_attn", " "),
    *("{{", "}}", "{%", "%}", "|||", "text", "\n", "\t", ",", ";", '"', "'", ":", "-", "&a", "*a"),
)


def chosen_of(sources: Sequence[bytes], mutate: Mutate) -> Callable[[Random], bytes]:
    """An input from one of some valid ones."""

    def made(random: Random) -> bytes:
        data = random.choice(sources)
        for _ in range(random.choice((0, 1, 1, 1, 2, 2, 3, 6))):
            data = mutate(data, random)
        return data[:LONGEST]

    return made


def text(words: Sequence[str]) -> Mutate:
    """Pieces of a text taken out, doubled, moved, and words of its language put in."""
    known = [word.encode("utf-8", "surrogatepass") for word in (*words, *_PIECES, *_HARD)]

    def mutate(data: bytes, random: Random) -> bytes:
        start, end = sorted(random.randint(0, len(data)) for _ in range(2))
        end = min(end, start + random.choice((1, 4, 30, len(data))))
        inside, word = data[start:end], random.choice(known[: len(words)] or known)
        put = random.choice(
            (
                lambda: b"",
                lambda: inside + inside,
                lambda: word,
                lambda: inside + word,
                lambda: word + inside,
                lambda: random.choice(known),
                lambda: inside * random.choice((3, 20, 300)),
                lambda: word * random.choice((2, 9, 200)),
                lambda: random.randbytes(random.choice((1, 2, 9))),
                lambda: inside[::-1],
                lambda: data[end : end + len(inside)] + inside,
            )
        )()
        made = data[:start] + put[:LONGEST] + data[end:]
        return made[: random.randint(0, len(made))] if random.random() < 0.05 else made

    return mutate


def document(words: Sequence[str]) -> Mutate:
    """A JSON document (which is YAML too) with values, keys and lists of another kind."""
    plain = text(words)

    def mutate(data: bytes, random: Random) -> bytes:
        try:
            root = [json.loads(data)]
        except (ValueError, RecursionError):
            return plain(data, random)
        if random.random() < 0.1:
            return plain(data, random)
        hard: list[str] = []
        places = _places(root)
        holder, key = random.choice(places)
        new = _new_value(holder[key], words, hard, random)
        kind = random.random()
        if kind < 0.6:
            holder[key] = new
        elif kind < 0.75 and holder is not root:
            del holder[key]
        elif isinstance(holder, dict):
            holder[random.choice((*words, *map(str, places[-1][1:]), "x"))] = new
        elif holder is not root:
            holder.insert(random.randint(0, len(holder)), new)
        else:
            root[0] = new
        try:
            made = json.dumps(root[0], ensure_ascii=random.random() < 0.8)
        except (ValueError, RecursionError):
            return plain(data, random)
        for number, source in enumerate(hard):
            made = made.replace(f'"<hard {number}>"', source)
        return made.encode("utf-8", "surrogatepass")

    return mutate


def parts(*mutates: Mutate) -> Mutate:
    """One of the files of an input that is several."""

    def mutate(data: bytes, random: Random) -> bytes:
        files = data.split(BETWEEN)
        place = random.randrange(len(files))
        files[place] = mutates[min(place, len(mutates) - 1)](files[place], random)
        return BETWEEN.join(files)

    return mutate


def _places(root: list[Any]) -> list[tuple[Any, Any]]:
    """(what holds a value, its key or index), of every value of a document."""
    found: list[tuple[Any, Any]] = [(root, 0)]
    for holder, key in found:
        value = holder[key]
        if isinstance(value, dict):
            found += [(value, inner) for inner in value]
        elif isinstance(value, list):
            found += [(value, index) for index in range(len(value))]
        if len(found) > 500:
            break
    return found


def _new_value(old: Any, words: Sequence[str], hard: list[str], random: Random) -> Any:
    kind = random.randrange(9)
    if kind < 3:
        hard.append(random.choice(_HARD))
        return f"<hard {len(hard) - 1}>"
    if kind == 3:
        return random.choice(words)
    if kind == 4:
        return "".join(random.choices((*_PIECES, *words), k=random.randint(1, 12)))
    if kind == 5:
        return [old] * random.choice((1, 2, 50))
    if kind == 6:
        return {random.choice(words): old}
    if kind == 7 and isinstance(old, int | float):
        return random.choice((old + 1, -old, old * 2**20, 0.5, [old], f"{old!r:.50}", not old))
    if kind == 7 and isinstance(old, str):
        mutated = text(words)(old.encode("utf-8", "surrogatepass"), random)
        return mutated.decode("utf-8", "replace")
    return random.choices(words, k=random.choice((0, 1, 2, 5, 40)))
