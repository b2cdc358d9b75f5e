# SPDX-License-Identifier: Apache-2.0
"""The training text: an endless stream of conversations and plain texts, the same for the same seed.

Independent of the tokenizer. A conversation is a list of messages, as chat templates take them.
"""

from collections.abc import Callable, Iterator
from random import Random

from benchmarks.demo import facts, records, stories, talk, tasks
from benchmarks.demo.talk import Exchange
from benchmarks.demo.words import capitalized

Messages = list[dict[str, str]]

# The topics and their weights.
TOPICS: tuple[tuple[Callable[[Random], list[Exchange]], float], ...] = (
    *((talk.small_talk, 8), (talk.about_me, 4), (talk.unknown, 6), (talk.tastes, 2), (talk.names, 4)),
    *((facts.capitals, 3), (facts.animals, 4), (facts.opposites, 2), (facts.properties, 5), (facts.calendar, 2)),
    *((facts.single, 2), (tasks.sums, 14), (tasks.word_problems, 4), (tasks.comparisons, 2), (tasks.counting, 3)),
    *((tasks.naming, 2), (tasks.spelling, 1.5), (tasks.repeating, 2), (records.records, 15), (records.given, 7)),
    *((records.lists, 3), (stories.stories, 11), (stories.verses, 1)),
)
SYSTEM = (
    *(
        "You are a helpful assistant.",
        "You are a friendly assistant.",
        "Answer briefly.",
        "You are a demo.",
        "Be kind.",
    ),
    *("You are jaxserve demo, a helpful assistant.", "Answer the user's questions.", "You are a storyteller."),
)
ORDERS = frozenset(
    ("Tell", "Write", "Give", "Make", "Name", "Spell", "Count", "Say", "Calculate", "Add", "List", "Create", "Generate")
)
PLAIN_SHARE = 0.16
USUAL_TOPICS = 4  # the most topics of a usual conversation


def exchanges(random: Random) -> list[Exchange]:
    """One topic, as the user might type it."""
    [topic] = random.choices([topic for topic, _ in TOPICS], [weight for _, weight in TOPICS])
    return [(_typed(random, asked), answer) for asked, answer in topic(random)]


def _typed(random: Random, text: str) -> str:
    """The text with variations as in typing."""
    orders = text.split(" ", 1)[0] in ORDERS
    if orders and random.random() < 0.08:
        text = random.choice(("Please ", "Can you ", "Could you ", "Now ")) + text[:1].lower() + text[1:]
    elif orders and text.endswith(".") and random.random() < 0.06:
        text = f"{text[:-1]}, please."
    elif random.random() < 0.04:
        text = (
            random.choice(("Hello! ", "Hi! ", "Hi, ", "Please help me. ", "One more thing: ", "Thanks! ", "OK. "))
            + text
        )
    if random.random() < 0.2:
        text = text.rstrip(".?!") or text
    if random.random() < 0.12 and not text[:2].isupper():
        text = text[:1].lower() + text[1:]
    return text


def conversation(random: Random, most: int = USUAL_TOPICS) -> Messages:
    """A conversation of up to `most` topics: mostly one topic; if many are allowed, mostly many."""
    messages: Messages = []
    if random.random() < 0.12:
        messages.append({"role": "system", "content": random.choice(SYSTEM)})
    topics = 1
    more = 0.3 if most <= USUAL_TOPICS else 0.97
    while topics < most and random.random() < more:
        topics += 1
    for _ in range(topics):
        for asked, answer in exchanges(random):
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return messages


def plain(random: Random) -> str:
    """Text without roles: sums, a story, or questions and answers in a row."""
    if random.random() < 0.4:
        return tasks.drill(random)
    if random.random() < 0.4:
        return stories.story(random, stories.cast(random))
    if random.random() < 0.5:
        return "\n".join(answer for _ in range(random.randint(1, 4)) for _, answer in exchanges(random))
    rows = [row for _ in range(random.randint(1, 3)) for row in exchanges(random)]
    return "\n".join(f"Question: {capitalized(asked)}\nAnswer: {answer}" for asked, answer in rows)


def documents(seed: int, most: int = USUAL_TOPICS) -> Iterator[Messages | str]:
    """Conversations of up to `most` topics, and some plain texts."""
    random = Random(seed)
    while True:
        yield plain(random) if random.random() < PLAIN_SHARE else conversation(random, most)
