# SPDX-License-Identifier: Apache-2.0
"""The training text: the same for the same seed, and correct wherever that can be checked."""

import json
import re
from itertools import islice
from random import Random

import pytest

from benchmarks.demo import corpus, records, stories, tasks
from benchmarks.demo.corpus import conversation, documents
from benchmarks.demo.talk import INTENTS
from benchmarks.demo.words import HEROES, a, listed, plural

SOME = list(islice(documents(3), 3000))
ANSWERS = [
    message["content"]
    for document in SOME
    if not isinstance(document, str)
    for message in document
    if message["role"] == "assistant"
]


def test_the_same_seed_gives_the_same_text() -> None:
    assert list(islice(documents(3), 3000)) == SOME
    assert list(islice(documents(4), 100)) != SOME[:100]


def test_conversations_alternate_between_user_and_assistant() -> None:
    for document in SOME:
        if isinstance(document, str):
            assert document
            continue
        roles = [message["role"] for message in document]
        if roles[0] == "system":
            roles = roles[1:]
        assert roles == ["user", "assistant"] * (len(roles) // 2) != []


def test_no_template_is_left_unfilled() -> None:
    for answer in ANSWERS:
        if not answer.startswith(("{", "[")):
            assert not set(answer) & set("{}<>|"), answer


def test_where_many_topics_are_allowed_conversations_are_long() -> None:
    lengths = [len(conversation(Random(seed), most=60)) for seed in range(20)]
    assert sum(lengths) / len(lengths) > 30


def test_sums_are_right() -> None:
    results = [found for answer in ANSWERS for found in re.findall(r"(\d+) ([-+*]) (\d+) = (\d+)", answer)]
    assert len(results) > 300
    for left, sign, right, result in results:
        wanted = {"+": int(left) + int(right), "-": int(left) - int(right), "*": int(left) * int(right)}[sign]
        assert int(result) == wanted


@pytest.mark.parametrize("seed", range(40))
def test_the_sum_is_the_one_that_was_asked_for(seed: int) -> None:
    for asked, answer in [*tasks.sums(Random(seed)), *tasks.word_problems(Random(seed))]:
        if "=" in answer:
            assert re.findall(r"\d+", asked)[:2] == re.findall(r"\d+", answer)[:2]
        else:
            assert "too" in answer and max(map(int, re.findall(r"\d+", asked))) >= 100


def test_whatever_looks_like_json_is_json() -> None:
    shown = [json.loads(answer) for answer in ANSWERS if answer.startswith(("{", "["))]
    assert len(shown) > 600 and {type(value) for value in shown} == {dict, list}


@pytest.mark.parametrize("seed", range(60))
def test_a_record_has_the_fields_that_were_asked_for_in_their_order(seed: int) -> None:
    [asked, answer], *_ = records.records(Random(seed))
    named = [
        word
        for word in re.findall(r"[a-z_]+", asked.split(" with")[-1])
        if word in (*records.FIELDS, *records.TOGETHER)
    ]
    if " with" in asked and "{fields}" not in asked and not re.search(r"of an? \w+\.$", asked):
        assert list(json.loads(answer)) == named


@pytest.mark.parametrize("seed", range(40))
def test_given_values_are_in_the_record(seed: int) -> None:
    [[asked, answer]] = records.given(Random(seed))
    for value in json.loads(answer).values():
        assert str(value) in asked


@pytest.mark.parametrize("seed", range(40))
def test_a_story_is_about_who_was_asked_for(seed: int) -> None:
    cast = stories.cast(Random(seed))
    text = stories.story(Random(seed), cast, with_thing=True)
    assert cast.name in text and cast.hero in text and cast.place in text and cast.thing in text
    assert text[0].isupper() and text[-1] in '."'


def test_who_it_is_it_says_as_a_toy() -> None:
    [answers] = [answers for said, answers in INTENTS if "Who are you?" in said]
    assert all("demo" in answer and "toy" in answer for answer in answers)


def test_every_topic_comes_up() -> None:
    for topic, weight in corpus.TOPICS:
        assert weight > 0
        assert all(asked and answer for seed in range(20) for asked, answer in topic(Random(seed)))


def test_the_grammar_of_words() -> None:
    assert [a(word) for word in ("owl", "unicorn", "umbrella", "fox")] == [
        "an owl",
        "a unicorn",
        "an umbrella",
        "a fox",
    ]
    assert [plural(word) for word in ("fox", "cherry", "donkey", "mouse")] == ["foxes", "cherries", "donkeys", "mice"]
    assert [listed(["x"]), listed(["x", "y"]), listed(["x", "y", "z"])] == ["x", "x and y", "x, y and z"]
    assert len(set(HEROES)) == len(HEROES)
