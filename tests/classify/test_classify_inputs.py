"""Texts and labels as callers give them: what is taken, and what is refused with its row."""

import datetime
import enum
import json
from collections import OrderedDict
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, cross_val_score
from support.tfew import tiny_llama, word_tokenizer

from ia3 import FewShotClassifier
from ia3.errors import IA3Error
from ia3.experiments.in_context import InContextClassifier
from ia3.files.rows import read_rows

TEXTS = ["cold tea", "hot soup", "cold ice", "hot pan"]
WORDS = ["cold", "hot", "tea", "soup", "ice", "pan", "0", "1", "2", "True", "False", "Category"]
WORDS += ["yes", "no", "maybe", "-", "9223372036854775807", "9223372036854775808", "a", "b"]
TOKENIZER = word_tokenizer(WORDS)
MODEL = tiny_llama(vocabulary=len(TOKENIZER))

pytestmark = pytest.mark.filterwarnings("ignore:the labels .* are ranked as these words")


def classifier(kind=FewShotClassifier, **settings):
    settings = {"template": None, **settings}
    steps = {"steps": 0, **settings} if kind is FewShotClassifier else settings
    return kind(MODEL, tokenizer=TOKENIZER, **steps)


KINDS = pytest.mark.parametrize("kind", [FewShotClassifier, InContextClassifier])

# -- fields ----------------------------------------------------------------------------------------

UNWRITABLE = {
    "None": None,
    "NaN": float("nan"),
    "infinity": float("-inf"),
    "numpy's NaN": np.float32("nan"),
    "a Decimal's NaN": Decimal("NaN"),
    "a signalling NaN": Decimal("sNaN"),
    "not a time": np.datetime64("NaT"),
    "bytes": b"cold",
    "numpy's bytes": np.bytes_(b"cold"),
    "a bytearray": bytearray(b"cold"),
    "an object": object(),
    "half a pair": "cold \ud800",
    "None in a list": ["cold", None],
    "NaN in an array": np.array([1.0, np.nan]),
    "bytes in a mapping": {"a": [{"b": b"cold"}]},
    "half a pair as a key": {"\udfff": 1},
}


@KINDS
@pytest.mark.parametrize("value", UNWRITABLE.values(), ids=list(UNWRITABLE))
def test_a_field_that_would_be_written_as_it_was_not_meant_is_refused_with_its_row(kind, value):
    rows = [{"title": "hot", "note": text} for text in TEXTS]
    labels = ["a", "b", "a", "b"]
    with pytest.raises(IA3Error, match=r"text 2: the field 'note'.* is "):
        classifier(kind).fit([*rows[:2], {"title": "hot", "note": value}, rows[3]], labels)
    fitted = classifier(kind).fit(rows, labels)
    for ask in (fitted.predict, fitted.predict_proba):
        with pytest.raises(IA3Error, match=r"text 1: the field 'note'.* is "):
            ask([rows[0], {"title": "hot", "note": value}])
    with pytest.raises(IA3Error, match=r"text 0: the field 'note'.* is "):
        fitted.score([{"title": "hot", "note": value}], ["a"])


def test_a_field_that_holds_itself_is_refused():
    endless = ["cold"]
    endless.append(endless)
    with pytest.raises(IA3Error, match="text 1: the field 'text' is nested deeper than 10 times"):
        classifier().fit(["cold", {"text": endless}], ["a", "b"])


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (3, "3"),
        (0.5, "0.5"),
        (True, "True"),
        (np.float32(0.1), "0.1"),
        (np.int64(-7), "-7"),
        (np.bool_(True), "True"),
        (Decimal("2.50"), "2.50"),
        (Fraction(1, 3), "1/3"),
        (datetime.date(2026, 1, 2), "2026-01-02"),
        (np.datetime64("2026-01-02"), "2026-01-02"),
        (["cold", 1], "['cold', 1]"),
        (OrderedDict(a="tea")["a"], "tea"),
        (np.str_("tea"), "tea"),
    ],
    ids=str,
)
def test_numbers_dates_and_lists_are_written_as_python_writes_them(value, written):
    # The demonstrations show how a field was written.
    rows = [{"text": value}, {"text": "soup"}]
    fitted = classifier(InContextClassifier, template="<{{ text }}>").fit(rows, ["a", "b"])
    assert f"<{written}>" in fitted.demonstrations_[0][0]


def test_what_no_template_reads_may_be_anything():
    rows = [{"text": "cold", "seen": float("nan")}, {"text": "hot", "seen": None}, {"text": "ice"}]
    fitted = classifier(template="{{ text }}").fit(rows, ["a", "b", "a"])
    assert len(fitted.predict([{"text": "tea"}])) == 1
    with pytest.raises(IA3Error, match="text 0: the field 'seen' is nan"):
        classifier(template="{{ fields }}").fit(rows[:2], ["a", "b"])


@KINDS
def test_a_row_without_a_field_of_the_first_one_is_named(kind):
    rows = [{"title": "hot", "note": "pan"}, {"title": "cold"}]
    with pytest.raises(IA3Error, match=r"text 1 has no field 'note': it has \['title'\]"):
        classifier(kind).fit(rows, ["a", "b"])
    fitted = classifier(kind).fit([rows[0]] * 2, ["a", "b"])
    with pytest.raises(IA3Error, match=r"text 1 has no field 'note'"):
        fitted.predict(rows)
    with pytest.raises(IA3Error, match="text 0 has no field 'title'"):
        fitted.predict(["cold"])


@KINDS
@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([{0: "cold"}, {0: "hot"}], r"a field's name is 0 \(int\), expected a string"),
        ([{"\ud800": "cold"}, {"\ud800": "hot"}], "a field's name is .* half of a surrogate pair"),
        ([{}, {}], "text 0 has no fields"),
        (["cold", "hot \udc00"], "text 1 is .* character 4 is half of a surrogate pair"),
        (["cold", None], r"text 1 is None \(NoneType\)"),
        (["cold", float("nan")], r"text 1 is nan \(float\)"),
        (["cold", b"hot"], r"text 1 is b'hot' \(bytes\)"),
        (np.array([b"cold", b"hot"]), r"text 0 is np.bytes_\(b'cold'\) \(bytes_\)"),
        (np.array([["cold"], ["hot"]]), r"text 0 is array\(.*\(ndarray\)"),
        (b"ab", "texts is one bytes, expected a list of texts"),
        ({"hot"}, "texts is one set, which has no order"),
        (None, r"texts is None \(NoneType\)"),
    ],
    ids=str,
)
def test_texts_that_are_none_are_refused_with_their_row(kind, texts, message):
    with pytest.raises(IA3Error, match=message):
        classifier(kind).fit(texts, ["a", "b"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"template": "{{ text }} \ud800"}, "a template is .* half of a surrogate pair"),
        ({"template": ["{{ text }}", 3]}, r"a template is 3 \(int\), expected a text"),
        ({"choices": {"a": "yes", "b": "no \ud800"}}, r"choices\['b'\] is .* half of a surrogate"),
        ({"choices": {"a": "yes", "b": None}}, r"choices\['b'\] is None, expected words"),
        ({"choices": ["a", "b"]}, "choices is a list, expected a mapping"),
        ({"choices": {"a": "yes", 1: "no"}}, r"label 1 of choices is 1, but label 0 is 'a'"),
        ({"choices": {"a": "yes", None: "no"}}, r"label 1 of choices is None \(NoneType\)"),
        ({"choices": {"a": "yes", "b": "no", "": "maybe"}}, "label 2 of choices is ''"),
        ({"choices": {"a": "yes", "b": "no", "c\0": "maybe"}}, "label 2 of choices .* NUL"),
        ({"steps": 1.5}, r"steps is 1.5 \(float\), expected a whole number"),
        ({"steps": True}, r"steps is True \(bool\), expected a whole number"),
        ({"seed": "0"}, r"seed is '0' \(str\), expected a whole number"),
        ({"learning_rate": "fast"}, r"learning_rate is 'fast' \(str\), expected a number"),
        ({"upper_blocks": 1.0}, r"upper_blocks is 1.0 \(float\), expected a whole number or None"),
        ({"chat": "false"}, r"chat is 'false' \(str\), expected True or False"),
    ],
    ids=str,
)
def test_settings_of_another_kind_are_refused(settings, message):
    with pytest.raises(IA3Error, match=message):
        classifier(**settings).fit(TEXTS, ["a", "b", "a", "b"])


# -- labels ----------------------------------------------------------------------------------------

FULL = 2**63


@KINDS
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([-1, 0, 1, FULL], "label 3 is 9223372036854775808, expected an integer of 64 bits"),
        ([0, 1, 2, 2 * FULL], "label 3 is 18446744073709551616, expected an integer of 64"),
        ([0, 1, 2, -FULL - 1], "label 3 is -9223372036854775809, expected an integer of 64"),
        ([0, 1, 2, 10**5000], "label 3 is an integer of 16610 bits, expected an integer of 64"),
        (["a", "b", "a", "a\0"], r"label 3 is 'a\\x00', which has a NUL"),
        (["a", "b", "a", "a\ud800"], "label 3 is .* half of a surrogate pair"),
        (["a", "b", "a", ""], "label 3 is ''"),
        (["a", "b", "a", " "], "label 3 is ' '"),
        (["a", "b", "a", None], r"label 3 is None \(NoneType\)"),
        ([1, 0, 1, None], r"label 3 is None \(NoneType\)"),
        (["a", "b", "a", float("nan")], r"label 3 is nan \(float\)"),
        (np.array([0, 1, 0, np.nan]), r"label 3 is nan \(float\), expected a string, an integer"),
        ([1, 0, True, 0], "label 2 is True, but label 0 is 1: expected labels of one kind"),
        ([True, False, True, 0], "label 3 is 0, but label 0 is True"),
        (["1", "0", "1", 0], "label 3 is 0, but label 0 is '1'"),
        (np.array([b"a", b"b", b"a", b"b"]), r"label 0 is np.bytes_\(b'a'\) \(bytes_\)"),
        (np.array(["2026-01-02"] * 4, "datetime64[ns]"), r"label 0 is .* \(datetime64\)"),
        (b"abab", "labels is one bytes, expected a list"),
        ({"a"}, "labels is one set, which has no order"),
        (["a", "b", "a"], "4 texts and 3 labels"),
    ],
    ids=lambda value: str(value)[:40] if not isinstance(value, list) else None,
)
def test_labels_that_cannot_be_classes_are_refused_with_their_row(kind, labels, message):
    with pytest.raises(IA3Error, match=message):
        classifier(kind).fit(TEXTS, labels)


class Colour(str, enum.Enum):  # noqa: UP042 - its `str()` is its name
    RED = "a"
    BLUE = "b"


class Number(enum.IntEnum):
    ONE = 1
    TWO = 2


@KINDS
@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["b", "a", "b", "a"], ["a", "b"]),
        (("b", "a", "b", "a"), ["a", "b"]),
        (np.array(["b", "a", "b", "a"]), ["a", "b"]),
        (np.array(["b", "a", "b", "a"], object), ["a", "b"]),
        ([np.str_("b"), "a", "b", "a"], ["a", "b"]),
        ([Colour.BLUE, Colour.RED, Colour.BLUE, "a"], ["a", "b"]),
        ([2, 1, 2, 1], [1, 2]),
        ([Number.TWO, Number.ONE, 2, 1], [1, 2]),
        (np.array([2, 1, 2, 1], np.uint8), [1, 2]),
        (torch.tensor([2, 1, 2, 1]), [1, 2]),
        ([np.int32(2), 1, np.uint64(2), 1], [1, 2]),
        ([FULL - 1, -FULL, FULL - 1, -FULL], [-FULL, FULL - 1]),
        ([True, False, True, False], [False, True]),
        (np.array([True, False, True, False]), [False, True]),
        (range(4), [0, 1, 2, 3]),
        (dict.fromkeys("badc").keys(), ["a", "b", "c", "d"]),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, list) else None,
)
def test_classes_are_the_labels_as_they_were_given(kind, labels, classes):
    words = dict(zip(classes, ["yes", "no", "maybe", "tea"], strict=False))
    fitted = classifier(kind, choices=words).fit(np.array(TEXTS), labels)
    kept = fitted.classes_.tolist()
    assert kept == classes
    assert [type(label) for label in kept] == [type(label) for label in classes]
    assert set(fitted.predict(TEXTS).tolist()) <= set(classes)


def test_choices_are_found_by_labels_of_numpy_and_enumerations():
    for choices in (
        {Colour.RED: "yes", Colour.BLUE: "no"},
        {np.str_("a"): "yes", np.str_("b"): "no"},
    ):
        fitted = classifier(choices=choices).fit(TEXTS, ["a", "b", "a", "b"])
        assert (fitted.classes_.tolist(), fitted.choices_) == (["a", "b"], ["yes", "no"])
    fitted = classifier(choices={np.int64(1): "yes", np.int64(0): "no"}).fit(TEXTS, [0, 1, 0, 1])
    assert (fitted.classes_.tolist(), fitted.choices_) == ([0, 1], ["no", "yes"])


@KINDS
def test_the_score_knows_a_boolean_from_an_integer(kind):
    fitted = classifier(kind).fit(TEXTS, [0, 1, 0, 1])
    with pytest.raises(IA3Error, match=r"label True \(row 0\) is not among the choices \[0, 1\]"):
        fitted.score(TEXTS, [True, False, True, False])
    right = fitted.predict(TEXTS)
    for labels in (right, right.tolist(), tuple(right), right.astype(np.int8)):
        assert fitted.score(TEXTS, labels) == 1.0


def test_numpys_numbers_of_a_grid_are_saved_as_pythons(tmp_path):
    settings = {"steps": np.int64(0), "learning_rate": np.float32(0.5), "seed": np.uint32(3)}
    classifier(**settings, chat=np.bool_(False)).fit(TEXTS, ["a", "b", "a", "b"]).save(tmp_path)
    task = json.loads((tmp_path / "ia3_task.json").read_text("utf-8"))
    assert [task[name] for name in (*settings, "chat")] == [0, 0.5, 3, False]
    loaded = FewShotClassifier.load(tmp_path, model=MODEL, tokenizer=TOKENIZER)
    assert loaded.settings_["learning_rate"] == 0.5


@KINDS
def test_scikit_learn_clones_splits_and_searches(kind):
    for labels in (["a", "b", "a", "b"], [1, 0, 1, 0], [True, False, True, False]):
        scores = cross_val_score(clone(classifier(kind)), np.array(TEXTS), labels, cv=2)
        assert len(scores) == 2
        assert not np.isnan(scores).any()
    search = GridSearchCV(classifier(kind), {"seed": np.arange(2)}, cv=2)
    assert search.fit(TEXTS, ["a", "b", "a", "b"]).best_params_["seed"] in (0, 1)


class Mood(str, enum.Enum):  # noqa: UP042 -- the old way, whose text is "Mood.GOOD"
    GOOD = "b"
    BAD = "a"


class Stars(enum.Enum):
    ONE = 1
    TWO = 2.0


@KINDS
@pytest.mark.parametrize(
    ("given", "plain"),
    [
        ([0.0, 1.0, 0.0, 1.0], [0, 1, 0, 1]),
        (np.array([1, -2, 1, -2], np.float32), [1, -2, 1, -2]),
        (torch.tensor([0.0, 1.0, 0.0, 1.0]), [0, 1, 0, 1]),
        (np.array([[0], [1], [0], [1]]), [0, 1, 0, 1]),
        (np.array([["a"], ["b"], ["a"], ["b"]]), ["a", "b", "a", "b"]),
        (torch.tensor([[0], [1], [0], [1]]), [0, 1, 0, 1]),
        ([Mood.GOOD, Mood.BAD] * 2, ["b", "a", "b", "a"]),
        ([Stars.ONE, Stars.TWO] * 2, [1, 2, 1, 2]),
        ([*enum.IntEnum("Kind", "A B")] * 2, [1, 2, 1, 2]),
    ],
    ids=str,
)
def test_labels_are_plain_values_however_they_are_given(kind, given, plain):
    fitted = classifier(kind).fit(TEXTS, given)
    expected = classifier(kind).fit(TEXTS, plain)
    assert fitted.classes_.tolist() == expected.classes_.tolist() == sorted({*plain})
    assert {type(label) for label in fitted.classes_.tolist()} == {type(plain[0])}
    np.testing.assert_array_equal(fitted.predict_proba(TEXTS), expected.predict_proba(TEXTS))
    assert fitted.score(TEXTS, given) == expected.score(TEXTS, plain)


def test_choices_and_weights_of_enumerations_and_floats_are_by_value():
    words = {Mood.GOOD: "hot", Mood.BAD: "cold"}
    fitted = classifier(choices=words, class_weight={Mood.BAD: 2}).fit(TEXTS, ["a", "b"] * 2)
    assert fitted.choices_ == ["cold", "hot"]
    fitted = classifier(choices={0.0: "hot", 1.0: "cold"}).fit(TEXTS, [0, 1, 0, 1])
    assert fitted.choices_ == ["hot", "cold"]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0.0, 1.5, 0, 1], r"label 1 is 1.5 \(float\), expected a string, an integer or a boolean"),
        ([0.0, float("nan"), 0, 1], "label 1 is nan"),
        ([0.0, float("inf"), 0, 1], "label 1 is inf"),
        ([0.0, 1e300, 0, 1], "label 1 is 1000.*, expected an integer of 64 bits"),
        ([1.0, True, 1.0, True], "label 1 is True, but label 0 is 1"),
        (
            np.array([[0, 1]] * 4),
            r"labels are \[4, 2\], expected one for each text.*multilabel=True",
        ),
        (np.zeros((4, 1, 1)), r"labels are \[4, 1, 1\]"),
        ({"a"}, "labels is one set, which has no order: give a list of labels"),
        (frozenset("a"), "labels is one frozenset, which has no order"),
    ],
    ids=str,
)
def test_labels_that_are_none_are_refused_by_what_they_are(labels, message):
    with pytest.raises(IA3Error, match=message):
        classifier().fit(TEXTS, labels)


@KINDS
def test_no_text_has_no_label_and_one_text_is_a_list_of_it(kind):
    for labels in (["a", "b", "a", "b"], [0, 1, 0, 1]):
        fitted = classifier(kind).fit(TEXTS, labels)
        for nothing in ([], (), np.array([]), iter([])):
            assert fitted.predict(nothing).tolist() == []
        assert fitted.predict([]).dtype == fitted.classes_.dtype
        assert fitted.predict_proba([]).shape == (0, 2)
        assert fitted.predict("cold tea").tolist() == fitted.predict(["cold tea"]).tolist()
        assert fitted.predict_proba("cold tea").shape == (1, 2)
    for call in (fitted.fit, fitted.score):
        with pytest.raises(IA3Error, match="there are no texts"):
            call([], [])
        with pytest.raises(IA3Error, match="texts is one str, expected a list of texts"):
            call("cold tea", [0])
    for texts in ({"cold"}, frozenset(["cold"])):
        with pytest.raises(IA3Error, match=r"texts is one .*set, which has no order"):
            fitted.predict(texts)


@KINDS
def test_texts_and_labels_have_scikit_learns_names(kind):
    labels = ["a", "b", "a", "b"]
    fitted = classifier(kind).fit(X=TEXTS, y=labels)
    assert fitted.score(X=TEXTS, y=fitted.predict(X=TEXTS), sample_weight=[1, 2, 3, 4]) == 1
    assert fitted.predict_proba(X=TEXTS).shape == (4, 2)


# -- tables ----------------------------------------------------------------------------------------


@pytest.mark.datasets
def test_a_data_frame_is_taken_and_what_it_misses_is_refused():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"title": TEXTS, "price": [1.5, 2, 3, 4]})
    labels = pandas.Series(["b", "a", "b", "a"], index=[3, 2, 1, 0], dtype="category")
    fitted = classifier().fit(frame, labels)
    assert fitted.classes_.tolist() == ["a", "b"]
    assert fitted.score(frame, fitted.predict(frame)) == 1.0
    days = frame.assign(day=pandas.to_datetime(["2026-01-02"] * 4))
    assert classifier().fit(days, labels).fields_ == ["title", "price", "day"]
    for lacking in (None, float("nan"), pandas.NA, pandas.NaT):
        values = pandas.Series([1, 2, lacking, 4], dtype=object)
        with pytest.raises(IA3Error, match="text 2: the field 'price' is "):
            classifier().fit(frame.assign(price=values), labels)
        with pytest.raises(IA3Error, match="label 2 is "):
            classifier().fit(frame, values)
    with pytest.raises(IA3Error, match="text 2: the field 'day' is NaT"):
        classifier().fit(days.assign(day=days.day.mask(days.index == 2)), labels)
    with pytest.raises(IA3Error, match="label 3 is <NA>"):
        classifier().fit(frame, pandas.array([0, 1, 0, None], dtype="Int64"))
    assert classifier().fit(frame, pandas.array([0, 1, 0, 1], "Int64")).classes_.tolist() == [0, 1]
    with pytest.raises(IA3Error, match="a field's name is 0"):
        classifier().fit(pandas.DataFrame([["cold"], ["hot"]]), ["a", "b"])


@pytest.mark.datasets
def test_nullable_and_categorical_columns_are_their_values():
    pandas = pytest.importorskip("pandas")
    plain = {"title": TEXTS, "price": [1, 2, 3, 4]}
    frame = pandas.DataFrame(plain)
    typed = frame.astype({"title": "string", "price": "Int64"})
    several = frame.astype({"title": "category", "price": "category"})
    expected = classifier().fit(frame, ["a", "b", "a", "b"]).predict_proba(frame)
    for each in (typed, several):
        fitted = classifier().fit(each, pandas.Series(["a", "b", "a", "b"], dtype="category"))
        np.testing.assert_array_equal(fitted.predict_proba(each), expected)
    for kind, classes in [
        *((kind, [0, 1]) for kind in ("Int64", "Float64", "float64", "category", "UInt8")),
        ("boolean", [False, True]),
        ("string", ["0", "1"]),
    ]:
        labels = pandas.Series([0, 1, 0, 1], index=[3, 2, 1, 0]).astype(kind)
        for given in (labels, labels.to_frame(), labels.array):
            fitted = classifier().fit(frame, given)
            assert fitted.classes_.tolist() == classes, kind
            assert type(fitted.classes_.tolist()[0]) is type(classes[0])
            fitted.score(frame, given)
    with pytest.raises(IA3Error, match=r"labels are \[4, 2\], expected one for each text"):
        classifier().fit(frame, frame)
    with pytest.raises(IA3Error, match=r"text 1: the field 'price' is (<NA>|None)"):
        classifier().fit(typed.assign(price=pandas.array([1, None, 3, 4], "Int64")), ["a", "b"] * 2)
    assert classifier().fit(frame, ["a", "b"] * 2).predict(frame[:0]).tolist() == []


@pytest.mark.datasets
def test_columns_and_tables_of_arrow_are_taken():
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"text": TEXTS, "label": ["b", "a", "b", "a"]})
    expected = classifier().fit(TEXTS, ["b", "a", "b", "a"]).predict_proba(TEXTS)
    for column in (lambda name: table[name], lambda name: table[name].combine_chunks()):
        fitted = classifier().fit(column("text"), column("label"))
        np.testing.assert_array_equal(fitted.predict_proba(column("text")), expected)
    fitted = classifier().fit(table.select(["text"]), table["label"])
    assert fitted.fields_ == ["text"]
    np.testing.assert_array_equal(fitted.predict_proba(table), expected)
    with pytest.raises(IA3Error, match="text 1 is None"):
        classifier().fit(pyarrow.array(["a", None]), ["a", "b"])


@pytest.mark.datasets
def test_a_parquet_file_with_nan_as_a_text_is_refused(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": [1.5, float("nan")], "label": ["a", "b"]}), path)
    with pytest.raises(IA3Error, match="row 1: the text 'text' is NaN, expected a string"):
        read_rows(path, text=["text"], label="label")
