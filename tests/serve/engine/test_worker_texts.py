"""The engine's texts: those of many requests are classified together, beside what generates."""

import asyncio

import pytest
import torch
from support.encoders import bert, random_encoder, tokenizer
from support.serving import engine_of, greedy, pieces_of
from support.tfew import tiny_llama, word_tokenizer

import ia3
from ia3 import FewShotClassifier, IA3Error, load_base_model
from ia3.base.encoders import load_encoder
from ia3.errors import StateError, UnknownNameError
from ia3.serve.engine.bases import ServedBase
from ia3.serve.engine.interface import Classification
from ia3.serve.engine.worker import MOST_TEXTS

TEXTS = ["red fox", "a lazy dog", "the fox", "my brown dog jumps over the fox", "dog", "red red"]
LABELS = ["fox", "dog", "bird"]
WORDS = " ".join([*TEXTS, *LABELS, "Is it ? Fox Dog Bird Category :"]).split()


def classifiers(base, root, kind):
    """Three classifiers of random vectors, saved: name -> text -> label and probabilities."""
    found = {}
    for seed in range(3):
        classifier = FewShotClassifier(base, steps=0).fit(TEXTS, LABELS * 2)
        generator = torch.Generator().manual_seed(seed)
        for vector in classifier.adapter_.vectors.values():
            vector.copy_(1 + 0.3 * torch.randn(vector.shape, generator=generator))
        classifier.save(root / f"{kind}{seed}")
        alone = FewShotClassifier.load(root / f"{kind}{seed}", model=base)
        answers = zip(alone.predict(TEXTS), alone.predict_proba(TEXTS), strict=True)
        found[f"{kind}{seed}"] = dict(zip(TEXTS, answers, strict=True))
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Both kinds of base models, the folder of their classifiers, and what these say alone."""
    root = tmp_path_factory.mktemp("classifiers")
    language = load_base_model(tiny_llama(), tokenizer=word_tokenizer(WORDS))
    encoder = load_encoder(random_encoder(bert()), tokenizer=tokenizer())
    return [
        (base, root, classifiers(base.model, root, kind))
        for base, kind in ((language, "l"), (encoder, "e"))
    ]


@pytest.fixture
def bases(made):
    found = []
    for base, root, by_name in made:
        bank = ia3.AdapterBank(base.model, capacity=3)
        for name in by_name:
            bank.add(name, root / name)
        found.append(ServedBase(base.model.config.model_type, base, bank))
    yield found
    for served in found:
        served.bank.close()


@pytest.fixture
def expected(made):
    """Name, text -> the label and probabilities that the classifier gives alone."""
    by_name = {name: of_name for _, _, found in made for name, of_name in found.items()}
    return lambda name, text: by_name[name][text]


async def answers_of(engine, texts, names, **more):
    (answers,) = [each async for each in engine.submit(Classification(texts, names, **more))]
    return answers


def run(awaitable):
    return asyncio.run(asyncio.wait_for(awaitable, 60))


def assert_right(answer, wanted):
    label, probabilities = wanted
    assert answer.label == label
    assert [*answer.probabilities.values()] == pytest.approx(probabilities, abs=1e-4)


def pairs_of(count, names):
    return [TEXTS[i % 6] for i in range(count)], [names[i % len(names)] for i in range(count)]


def test_texts_of_many_requests_get_the_answers_that_each_gets_alone(bases, expected):
    requests = [pairs_of(count, ["l0", "e1", "l2", "e0"]) for count in (1, 4, 2, 3, 7, 1, 2)]

    async def all_at_once(engine):
        return await asyncio.gather(*(answers_of(engine, *request) for request in requests))

    with engine_of(*bases) as engine:
        found = run(all_at_once(engine))
        assert engine.load().running == engine.load().waiting == 0
        # Together, that is: a batch of each base, and what came after it had begun.
        assert engine.load().batches < len(requests)
        assert engine.load().batched == sum(len(texts) for texts, _ in requests)
    for (texts, names), answers in zip(requests, found, strict=True):
        for text, name, answer in zip(texts, names, answers, strict=True):
            assert_right(answer, expected(name, text))


def test_a_request_of_very_many_texts_is_answered_in_order_and_stops_no_generation(bases, expected):
    texts, names = pairs_of(3 * MOST_TEXTS + 5, ["l0", "l1", "l2"])

    async def beside(engine):
        stream = engine.submit(greedy((3, 4, 5), "l0", 400, stop=("nothing",)))
        await anext(stream)
        answers = asyncio.ensure_future(answers_of(engine, texts, names))
        tokens = 0
        while not answers.done():
            tokens += (await anext(stream)).tokens
        await stream.aclose()
        return await answers, tokens

    bases[0].base.model.generation_config.eos_token_id = [10**6]
    with engine_of(*bases) as engine:
        answers, tokens = run(beside(engine))
    assert tokens >= 3
    for text, name, answer in zip(texts, names, answers, strict=True):
        assert_right(answer, expected(name, text))


def test_few_texts_do_not_wait_for_the_very_many_of_another(bases):
    texts, names = pairs_of(20 * MOST_TEXTS, ["l0", "l1"])

    async def both(engine):
        many = asyncio.ensure_future(answers_of(engine, texts, names))
        await until_it_runs(engine)
        await asyncio.gather(*(answers_of(engine, ["dog"], ["l0"]) for _ in range(3)))
        assert not many.done()
        many.cancel()
        await asyncio.gather(many, return_exceptions=True)

    with engine_of(*bases) as engine:
        run(both(engine))


def test_a_text_or_adapter_that_is_wrong_fails_alone(bases, expected):
    async def both(engine):
        wrong = answers_of(engine, ["red fox", "dog"], ["l0", "nobody"])
        bad = answers_of(engine, [{"other": "dog"}], ["l1"])
        good = answers_of(engine, ["the fox"], ["l2"])
        return await asyncio.gather(wrong, bad, good, return_exceptions=True)

    with engine_of(*bases) as engine:
        wrong, bad, good = run(both(engine))
    assert_right(wrong[0], expected("l0", "red fox"))
    assert isinstance(wrong[1], UnknownNameError)
    # Which others there are is not every client's business.
    assert "did you mean" not in str(wrong[1])
    assert "'nobody'" in str(wrong[1])
    # In its place, or raised: either way it is of this request alone.
    assert isinstance(bad[0] if isinstance(bad, list) else bad, IA3Error)
    assert_right(good[0], expected("l2", "the fox"))


def test_as_many_adapters_as_texts(bases):
    with engine_of(*bases) as engine, pytest.raises(IA3Error, match="1 adapters and 2 texts"):
        run(answers_of(engine, ["dog", "fox"], ["l0"]))
    with engine_of(*bases) as engine:
        assert run(answers_of(engine, [], [])) == []


def test_an_error_of_the_model_is_told_to_all_and_ends_nothing(bases, expected):
    failing = [True]

    def fail(*_):
        if failing[0]:
            raise RuntimeError("out of memory")

    handle = bases[0].base.model.register_forward_pre_hook(fail)

    async def both(engine):
        asked = [answers_of(engine, [text], ["l0"]) for text in TEXTS[:3]]
        errors = await asyncio.gather(*asked, return_exceptions=True)
        failing[0] = False
        return errors, await answers_of(engine, ["dog"], ["l0"])

    with engine_of(*bases) as engine:
        errors, (answer,) = run(both(engine))
        assert engine.load().running == engine.load().waiting == 0
    handle.remove()
    assert [str(error) for error in errors] == ["out of memory"] * 3
    assert_right(answer, expected("l0", "dog"))


async def until_it_runs(engine):
    while engine.load().running == 0:
        await asyncio.sleep(0.001)


def test_a_request_that_is_left_waits_no_longer(bases):
    texts, names = pairs_of(1000, ["l0", "l1"])

    async def leave(engine):
        task = asyncio.ensure_future(answers_of(engine, texts, names))
        await until_it_runs(engine)
        load = engine.load()
        assert load.running + load.waiting <= 1000
        assert load.running <= MOST_TEXTS
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert engine.load().waiting == 0
        while engine.load().running:
            await asyncio.sleep(0.001)
        assert engine.load().batched <= 500

    with engine_of(*bases) as engine:
        run(leave(engine))


def test_what_waits_for_a_server_that_closes_is_told_so(bases):
    texts, names = pairs_of(1000, ["l0", "l1"])

    async def close(engine):
        task = asyncio.ensure_future(answers_of(engine, texts, names))
        await until_it_runs(engine)
        engine.close()
        with pytest.raises(StateError, match="shut down"):
            await task

    with engine_of(*bases) as engine:
        run(close(engine))


def test_an_encoder_generates_nothing_and_the_base_model_is_the_language_model(bases):
    language, encoder = bases
    with engine_of(encoder, language) as engine:
        with pytest.raises(IA3Error, match="'e0' is of the sentence encoder 'bert'"):
            run(pieces_of(engine.submit(greedy((3, 4), "e0", 3))))
        pieces = run(pieces_of(engine.submit(greedy((3, 4), None, 3))))
        assert pieces[-1].finish
    with engine_of(encoder) as engine, pytest.raises(IA3Error, match="no language model"):
        run(pieces_of(engine.submit(greedy((3, 4), None, 3))))
