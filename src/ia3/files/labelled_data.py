"""What is wrong with labelled texts, as far as it can be told by looking at them.

Nothing here reads a meaning, and nothing heavy is imported: `ia3 check` takes a moment.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from ..arguments import instance, listed, whole
from ..errors import LONGEST_COMPARED, IA3Error, InvalidTypeError, counted, shown

EMPTY = "empty"
REPEATED = "repeated"
CONTRADICTORY = "contradictory"
SIMILAR_LABELS = "similar labels"
ONE_CLASS = "one class"
IMBALANCED = "imbalanced"
LONG = "long"
OVERLAP = "overlap"
UNKNOWN_LABEL = "unknown label"

# Of a text's field; the rest is not read. A page has some 500.
MAX_WORDS = 500
# The largest class has so many times the texts of the smallest.
MOST_TIMES = 10
# How like two labels' names are, 0 to 1, of which one may be a slip of the pen; and how many times
# rarer it is then. Slips are looked for among so many labels: each is compared with each.
LIKENESS = 0.85
TIMES_RARER = 3
MOST_LABELS = 500
# Of a text or a label in a message.
_LONGEST_SHOWN = 60
# Characters of scripts that put no spaces between words, and symbols: each counts as a word.
_ALONE = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2190-\u9fff\uf900-\ufaff\U0001f000-\U0003ffff"
# A run of characters without end, such as a link, counts as several.
_WORD = re.compile(rf"[{_ALONE}]|[^\s{_ALONE}]{{1,20}}")


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with labelled texts.

    Attributes:
        kind: `"empty"`, `"repeated"`, `"contradictory"`, `"similar labels"`, `"one class"`,
            `"imbalanced"`, `"long"`, `"overlap"` or `"unknown label"`.
        message: what is wrong, where it is first, and what to do.
        rows: where all of it is, as `where` says.
    """

    kind: str
    message: str
    rows: tuple[str, ...]


def check_examples(
    texts: Any,
    labels: Any,
    *,
    test_texts: Any = None,
    test_labels: Any = None,
    where: Sequence[str] | None = None,
    test_where: Sequence[str] | None = None,
    max_words: int | None = MAX_WORDS,
) -> list[Finding]:
    """Look for what makes a classifier worse, or its measured accuracy wrong.

    That is: empty texts; the same text twice, or with two labels; labels that differ by case or
    white space, or look like a slip of the pen; one label for all texts; a class of ten times the
    texts of another; texts of more words than are read; a test text that was trained on; a label in
    the test that no training text has. Texts that differ by case and white space alone are the
    same.

    Args:
        texts: strings, or mappings from field names to values, `[examples]`.
        labels: a label each, or a list or set of labels, `[examples]`.
        test_texts, test_labels: what the classifier is to be tested on, `[tests]`.
        where: what to call each example in messages, `[examples]`; `"text 0"` and so on if absent.
        test_where: as `where`, `[tests]`.
        max_words: texts of more are found; `None` finds none.

    Returns:
        One finding a kind, or a group of labels, in the order above; none where nothing is wrong.

    Raises:
        InvalidTypeError: a text is neither a string nor a mapping, or an argument is of another
            type.
        IA3Error: there are not as many labels, or places, as texts; `max_words` is below 1.

    Example:
        >>> from ia3 import check_examples
        >>> texts = ["I was charged twice.", "i was charged twice. ", "Where is my parcel?"]
        >>> for finding in check_examples(texts, ["billing", "delivery", "delivery"]):
        ...     print(finding.message)
        1 text has two labels: text 0 and text 1 ('I was charged twice.' is 'billing' and \
'delivery'): keep the right one
    """
    if max_words is not None:
        whole("max_words", max_words, 1, expected="at least 1")
    training = _Texts.of("texts", "labels", texts, labels, where, "text")
    found = [
        *_empty(training),
        *_twice(training),
        *_similar_labels(training),
        *_one_class(training),
        *_imbalanced(training),
        *_long(training, max_words),
    ]
    if test_texts is None:
        if test_labels is not None:
            raise IA3Error("test_labels are given without test_texts: give both")
        return found
    test = _Texts.of("test_texts", "test_labels", test_texts, test_labels, test_where, "test text")
    again = [finding for finding in _twice(test) if finding.kind == CONTRADICTORY]
    return [
        *found,
        *_empty(test),
        *again,
        *_long(test, max_words),
        *_overlap(training, test),
        *_unknown_labels(training, test),
    ]


def cut(text: str, max_words: int) -> str:
    """The beginning of a text, with so many words at most.

    A character of a script without spaces counts as a word, and 20 others in a row as one.
    """
    if len(text) <= max_words:
        return text
    ends = (match.end() for match in _WORD.finditer(text))
    last = next(islice(ends, max_words - 1, None), None)
    # White space at the end is no word more.
    return text if last is None or not text[last:].strip() else text[:last]


# -- the texts -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Texts:
    """Texts with their labels: `keys` are equal where texts are the same; `where` names them."""

    fields: list[list[str]]
    keys: list[str]
    labels: list[tuple[str, ...]]
    where: list[str]

    @classmethod
    def of(
        cls, name: str, labels_name: str, texts: Any, labels: Any, where: Any, called: str
    ) -> _Texts:
        fields = [_fields(text, f"{called} {row}") for row, text in enumerate(_rows(name, texts))]
        named = [_names(label) for label in _rows(labels_name, labels)]
        places = [f"{called} {row}" for row in range(len(fields))]
        if where is not None:
            places = [
                instance("a place in where", place, str, "a text")
                for place in listed("where", where, "a list of places")
            ]
        for what, count in ((labels_name, len(named)), ("where", len(places))):
            if count != len(fields):
                raise IA3Error(
                    f"there are {len(fields)} {name} and {count} {what}: expected one each"
                )
        # Fields are told apart by a character that no text has.
        keys = ["\0".join(" ".join(f.split()).casefold() for f in of_text) for of_text in fields]
        return cls(fields, keys, named, places)

    def has_words(self, row: int) -> bool:
        return bool(self.keys[row].strip("\0"))

    def said(self, row: int) -> str:
        """A text in a message: its first field that is not empty, cut short."""
        text = next((f for f in self.fields[row] if f.strip()), "")
        return _short(" ".join(text.split()))


def _rows(name: str, values: Any) -> list[Any]:
    """The rows of a list, an array, or a table of pandas, which knows how to give them."""
    if isinstance(values, str | bytes | Mapping | set | frozenset):
        raise InvalidTypeError(f"{name} is one {type(values).__name__}, expected a list of {name}")
    if hasattr(values, "to_dict") and hasattr(values, "columns"):
        return list(values.to_dict("records"))
    expected = f"a list of {name}"
    try:
        return listed(name, values, expected)
    except TypeError as error:  # an array of no dimension
        if isinstance(error, InvalidTypeError):
            raise
        raise InvalidTypeError(f"{name} is {shown(values)}, expected {expected}") from error


def _fields(text: Any, called: str) -> list[str]:
    if isinstance(text, str):
        return [text]
    if isinstance(text, Mapping):
        return [value if isinstance(value, str) else shown(value) for value in text.values()]
    raise InvalidTypeError(
        f"{called} is {shown(text)} ({type(text).__name__}), expected a string or a mapping from "
        "field names to values"
    )


def _names(label: Any) -> tuple[str, ...]:
    """The labels of a text, as words, sorted; most have one."""
    if isinstance(label, list | tuple | set | frozenset):
        return tuple(sorted(map(_name, label)))
    return (_name(label),)


def _name(label: Any) -> str:
    return label if isinstance(label, str) else shown(getattr(label, "value", label))


# -- what is looked for ----------------------------------------------------------------------------


def _empty(texts: _Texts) -> Iterable[Finding]:
    rows = [row for row in range(len(texts.keys)) if not texts.has_words(row)]
    if rows:
        what = f"{counted(len(rows), 'text')} {'are' if rows[1:] else 'is'} empty"
        yield _finding(EMPTY, texts, rows, f"{what}: {_places(texts, rows)}: leave such rows out")


def _twice(texts: _Texts) -> Iterable[Finding]:
    """The same text with another label, then with the same one."""
    of_text: dict[str, list[int]] = {}
    for row, key in enumerate(texts.keys):
        if texts.has_words(row):
            of_text.setdefault(key, []).append(row)
    several = [rows for rows in of_text.values() if len(rows) > 1]
    repeated: list[list[int]] = []
    contradictory: list[list[int]] = []
    for rows in several:
        same = len({texts.labels[row] for row in rows}) == 1
        (repeated if same else contradictory).append(rows)
    if contradictory:
        first = contradictory[0][0]
        other = next(r for r in contradictory[0] if texts.labels[r] != texts.labels[first])
        labels = " and ".join(_short(", ".join(texts.labels[row])) for row in (first, other))
        which = f"{_places(texts, [first, other])} ({texts.said(first)} is {labels})"
        count = counted(len(contradictory), "text")
        what = f"{count} {'have' if contradictory[1:] else 'has'} two labels: {which}"
        rows = [row for of_text in contradictory for row in of_text]
        yield _finding(CONTRADICTORY, texts, rows, f"{what}: keep the right one")
    if repeated:
        copies = repeated[0]
        which = f"{_places(texts, copies)} ({texts.said(copies[0])})"
        count = counted(len(repeated), "text")
        what = f"{count} {'are' if repeated[1:] else 'is'} there more than once: {which}"
        rows = [row for of_text in repeated for row in of_text]
        advice = "keep one, as a copy that is held out would count as answered"
        yield _finding(REPEATED, texts, rows, f"{what}: {advice}")


def _similar_labels(texts: _Texts) -> Iterable[Finding]:
    counts = _counts(texts)
    alike: dict[str, list[str]] = {}
    for label in counts:
        alike.setdefault(" ".join(label.split()).casefold(), []).append(label)
    slips = {label for labels in alike.values() for label in labels[1:]}
    for labels in alike.values():
        if len(labels) > 1:
            # The most frequent one first; the others may be slips of the pen.
            labels.sort(key=lambda label: -counts[label])
            said = ", ".join(f"{_short(each)} ({counts[each]})" for each in labels)
            rows = _rows_with(texts, labels[1:])
            what = f"labels that differ by case or white space alone are classes apart: {said}"
            message = f"{what}, first in {texts.where[rows[0]]}: write them alike"
            yield _finding(SIMILAR_LABELS, texts, rows, message)
    if len(counts) > MOST_LABELS:
        return
    for label, count in counts.items():
        near = [
            other
            for other, times in counts.items()
            if times >= TIMES_RARER * count and label not in slips and _may_be_a_slip(label, other)
        ]
        if near:
            rows = _rows_with(texts, [label])
            other = max(near, key=counts.__getitem__)
            what = f"the label {_short(label)} ({counted(count, 'text')}, {_places(texts, rows)})"
            meant = f"may be a slip of the pen for {_short(other)} ({counts[other]})"
            yield _finding(SIMILAR_LABELS, texts, rows, f"{what} {meant}")


def _may_be_a_slip(label: str, other: str) -> bool:
    """Whether two names are almost alike, and differ neither in numbers nor by what is added."""
    one, two = sorted((label.casefold(), other.casefold()), key=len)
    if one == two or len(two) > LONGEST_COMPARED or two.startswith(one) or two.endswith(one):
        return False
    if re.findall(r"\d+", one) != re.findall(r"\d+", two):
        return False
    matcher = difflib.SequenceMatcher(None, one, two, autojunk=False)
    return matcher.quick_ratio() >= LIKENESS and matcher.ratio() >= LIKENESS


def _one_class(texts: _Texts) -> Iterable[Finding]:
    if len({*texts.labels}) == 1:
        said = ", ".join(map(_short, texts.labels[0])) or "none"
        message = f"all labels are {said}: there is nothing to tell apart; add texts of another"
        yield _finding(ONE_CLASS, texts, range(len(texts.labels)), message)


def _imbalanced(texts: _Texts) -> Iterable[Finding]:
    counts = _counts(texts)
    if len(counts) < 2:
        return
    (most, many), (least, few) = max(counts.items(), key=_second), min(counts.items(), key=_second)
    if many < MOST_TIMES * few:
        return
    rare = [label for label, count in counts.items() if many >= MOST_TIMES * count]
    others = f" (and {counted(len(rare) - 1, 'class', 'classes')} more)" if rare[1:] else ""
    message = (
        f"the classes are unequal: {_short(most)} has {counted(many, 'text')}, {_short(least)} has "
        f"{few}{others}; what is rare is answered less often than it is right: label more of it"
    )
    yield _finding(IMBALANCED, texts, _rows_with(texts, rare), message)


def _long(texts: _Texts, max_words: int | None) -> Iterable[Finding]:
    if max_words is None:
        return
    rows = [
        row
        for row, fields in enumerate(texts.fields)
        if any(len(cut(field, max_words)) < len(field) for field in fields)
    ]
    if rows:
        has = "have" if rows[1:] else "has"
        what = f"{counted(len(rows), 'text')} {has} more than {counted(max_words, 'word')}"
        message = f"{what}: {_places(texts, rows)}: what follows these is not read"
        yield _finding(LONG, texts, rows, message)


def _overlap(training: _Texts, test: _Texts) -> Iterable[Finding]:
    known: dict[str, int] = {}
    for row, key in enumerate(training.keys):
        if training.has_words(row):
            known.setdefault(key, row)
    rows = [row for row, key in enumerate(test.keys) if key in known]
    if rows:
        first = rows[0]
        is_one = f"{test.where[first]} is {training.where[known[test.keys[first]]]}"
        among = "are among the training texts" if rows[1:] else "is among the training texts"
        what = f"{counted(len(rows), 'test text')} {among}: {is_one} ({test.said(first)})"
        message = f"{what}: leave them out of one, as a trained text says nothing of new ones"
        yield _finding(OVERLAP, test, rows, message)


def _unknown_labels(training: _Texts, test: _Texts) -> Iterable[Finding]:
    known, counts = _counts(training), _counts(test)
    for label in counts:
        if label not in known:
            rows = _rows_with(test, [label])
            near = difflib.get_close_matches(label[:LONGEST_COMPARED], list(known)[:MOST_LABELS], 1)
            hint = f"; did you mean {_short(near[0])}?" if near else ""
            what = f"no training text has the test's label {_short(label)}"
            yield _finding(UNKNOWN_LABEL, test, rows, f"{what} ({_places(test, rows)}){hint}")


# -- in words --------------------------------------------------------------------------------------


def _finding(kind: str, texts: _Texts, rows: Iterable[int], message: str) -> Finding:
    return Finding(kind, message, tuple(texts.where[row] for row in rows))


def _counts(texts: _Texts) -> Counter[str]:
    return Counter(label for labels in texts.labels for label in labels)


def _rows_with(texts: _Texts, labels: Iterable[Hashable]) -> list[int]:
    asked = set(labels)
    return [row for row, of_text in enumerate(texts.labels) if not asked.isdisjoint(of_text)]


def _places(texts: _Texts, rows: Sequence[int]) -> str:
    """Where some rows are: the first two, and how many more."""
    places = [texts.where[row] for row in rows[:2]]
    # The file is named once: "train.csv, line 2 and line 7".
    file = places[0].rpartition(", ")[0]
    said = " and ".join([places[0], *(p.removeprefix(f"{file}, ") for p in places[1:])])
    return said if len(rows) <= 2 else f"{said} and {len(rows) - 2:,} more"


def _short(text: str) -> str:
    return repr(text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…")


def _second(pair: tuple[str, int]) -> int:
    return pair[1]
