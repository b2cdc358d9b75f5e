# SPDX-License-Identifier: Apache-2.0
"""JSON on request: records with requested fields or given values, and lists."""

import json
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from benchmarks.demo.talk import Exchange
from benchmarks.demo.words import (
    ANIMALS,
    CAPITALS,
    CITIES,
    COLORS,
    FOODS,
    FRUITS,
    HEROES,
    HOBBIES,
    JOBS,
    NAMES,
    NUMBERS,
    PET_NAMES,
    THINGS,
    a,
    capitalized,
    listed,
    made_up,
)

Record = dict[str, Any]


def _choice(values: Sequence[Any]) -> Callable[[Random], Any]:
    return lambda random: random.choice(values)


def _title(random: Random) -> str:
    shape = random.choice(("The {} {}", "A {} {}", "The {} of {}"))
    color, thing = random.choice(COLORS), capitalized(random.choice(THINGS))
    return shape.format(thing, random.choice(CITIES)) if "of" in shape else shape.format(capitalized(color), thing)


FIELDS: dict[str, Callable[[Random], Any]] = {
    "age": lambda random: random.randint(1, 90),
    "job": _choice(JOBS),
    "hobby": _choice(HOBBIES),
    "color": _choice(COLORS),
    "kind": _choice(ANIMALS),
    "price": lambda random: random.choice((random.randint(1, 99), random.randint(1, 99) + 0.5)),
    "quantity": lambda random: random.randint(1, 50),
    "in_stock": _choice((True, False)),
    "title": _title,
    "author": _choice(NAMES),
    "year": lambda random: random.randint(1950, 2025),
    "pages": lambda random: random.randint(5, 60) * 10,
    "size": _choice(("small", "medium", "large")),
    "weight": lambda random: random.randint(1, 90),
    "height": lambda random: random.randint(100, 200),
    "rating": lambda random: random.randint(1, 5),
    "active": _choice((True, False)),
    "id": lambda random: random.randint(1, 999),
    "tags": lambda random: random.sample(("new", "old", "big", "small", "good", "cheap", "fun", "sweet"), 2),
    "food": _choice(FOODS),
    "friend": _choice(NAMES),
    "temperature": lambda random: random.randint(-10, 35),
    "sky": _choice(("sunny", "cloudy", "rainy", "windy")),
    "genre": _choice(("comedy", "drama", "fantasy", "crime", "history", "adventure")),
    "language": _choice(("English", "French", "German", "Spanish", "Italian", "Japanese")),
    "brand": _choice(("Sunrise", "Nordic", "Falcon", "Bluebird", "Maple")),
    "speed": lambda random: random.randint(5, 250),
    "score": lambda random: random.randint(0, 100),
    "status": _choice(("new", "open", "paid", "sent", "done")),
    "date": lambda random: f"{random.randint(2000, 2025)}-{random.randint(1, 12):02}-{random.randint(1, 28):02}",
    "population": lambda random: random.randint(1, 90) * 100_000,
    "married": _choice((True, False)),
}
TOGETHER = ("name", "email", "city", "country")  # fields whose values fit each other
# The fields of each kind of record. Those that it has by default come first.
KINDS: dict[str, tuple[str, ...]] = {
    "person": ("name", "age", "city", "job", "hobby", "email", "country", "height", "friend", "married"),
    "user": ("name", "email", "active", "age", "id", "city"),
    "customer": ("name", "city", "email", "age", "id", "country"),
    "student": ("name", "age", "hobby", "city", "email", "score"),
    "teacher": ("name", "age", "city", "hobby", "email"),
    "book": ("title", "author", "year", "pages", "price", "rating", "genre", "language"),
    "movie": ("title", "year", "rating", "country", "tags"),
    "pet": ("name", "kind", "age", "color", "weight", "food", "friend"),
    "cat": ("name", "age", "color", "weight", "food"),
    "dog": ("name", "age", "color", "weight", "food", "size"),
    "product": ("name", "price", "in_stock", "color", "quantity", "size", "tags", "id"),
    "car": ("brand", "color", "year", "price", "speed"),
    "city": ("name", "country", "population", "language"),
    "weather report": ("city", "temperature", "sky", "date"),
    "order": ("id", "name", "quantity", "price", "status", "date"),
    "house": ("city", "color", "size", "price", "year"),
    "dragon": ("name", "color", "age", "size", "food"),
    "robot": ("name", "job", "color", "year", "id"),
}
NAMES_OF = {
    "pet": PET_NAMES,
    "cat": PET_NAMES,
    "dog": PET_NAMES,
    "product": THINGS,
    "city": CITIES,
    "dragon": PET_NAMES,
}
PLURALS = {"person": "people", "city": "cities"}
REQUESTS = (
    "Give me a JSON record of {one} with {fields}.",
    "Give me {one} as JSON with {fields}.",
    "Write a JSON record of {one} with {fields}.",
    "Write a JSON object for {one} with {fields}.",
    "Make a JSON record for {one} with the fields {fields}.",
    "I need a JSON object of {one} with {fields}.",
    "JSON: {one} with {fields}",
    "Create {one} in JSON with the keys {fields}.",
    "Reply with JSON only: {one} with {fields}.",
    "Return JSON for {one} with {fields}.",
    "Describe {one} in JSON, with {fields}.",
    "Generate a JSON record with {fields} for {one}.",
    "Write JSON with {fields} of {one}.",
)
PLAIN_REQUESTS = (
    "Give me a JSON record of {one}.",
    "Write a JSON record of {one}.",
    "Write {one} as JSON.",
    "Describe {one} in JSON.",
    "JSON of {one}, please.",
    "Make a JSON object for {one}.",
    "Give me JSON for {one}.",
)
ANY_REQUESTS = (
    "Give me a JSON record.",
    "Write some JSON.",
    "Show me JSON.",
    "Give me an example of JSON.",
    "JSON please",
)


def record(random: Random, kind: str, fields: Sequence[str]) -> Record:
    name = random.choice(NAMES_OF.get(kind, NAMES))
    country, city = random.choice(list(CAPITALS.items()))
    fitting = {
        "name": name,
        "email": f"{name.lower()}@example.com",
        "city": city,
        "country": country.removeprefix("the "),
    }
    return {field: fitting[field] if field in TOGETHER else FIELDS[field](random) for field in fields}


def _fields(random: Random, kind: str, most: int = 5) -> list[str]:
    pool = [*TOGETHER, *FIELDS] if random.random() < 0.1 else list(KINDS[kind])
    return random.sample(pool, random.randint(1, min(most, len(pool))))


def _named(random: Random, fields: Sequence[str]) -> str:
    """The fields as a user may name them."""
    match random.randrange(5):
        case 0:
            return ", ".join(fields)
        case 1:
            return listed([f'"{field}"' for field in fields])
        case _:
            return listed(fields)


def records(random: Random) -> list[Exchange]:
    """A record with chosen fields, and perhaps another, or a question about it."""
    kind = random.choice(list(KINDS)) if random.random() < 0.7 else "person"
    draw = random.random()
    if draw < 0.75:
        shown = kind if random.random() < 0.9 else random.choice((*HEROES, *THINGS, made_up(random)))
        fields = _fields(random, kind)
        asked = random.choice(REQUESTS).format(one=a(shown), fields=_named(random, fields))
    else:
        kind = kind if draw < 0.95 else "person"
        fields = list(KINDS[kind][:3])
        asked = random.choice(PLAIN_REQUESTS if draw < 0.95 else ANY_REQUESTS).format(one=a(kind))
    made = record(random, kind, fields)
    exchanges = [(asked, json.dumps(made))]
    if random.random() < 0.25:
        made = record(random, kind, fields)
        again = random.choice(("Another one.", "Another one, please.", "Again", "One more.", "Give me another."))
        exchanges.append((again, json.dumps(made)))
    if random.random() < 0.1:
        exchanges.append(_edit(random, kind, made))
    return exchanges


def _edit(random: Random, kind: str, made: Record) -> Exchange:
    """The record with a value changed or a field added, or the value of a field."""
    field = random.choice(list(made))
    absent = [name for name in KINDS[kind] if name not in made and name in FIELDS]
    draw = random.random()
    if draw < 0.4 and absent:
        extra = random.choice(absent)
        return f"Add the {extra}.", json.dumps({**made, extra: FIELDS[extra](random)})
    plain = [name for name, value in made.items() if isinstance(value, str | int) and not isinstance(value, bool)]
    if draw < 0.7 and plain:
        field = random.choice(plain)
        value = record(random, kind, [field])[field]
        asked = random.choice(("Change the {} to {}.", "Make the {} {}.", "Set the {} to {}."))
        return asked.format(field, value), json.dumps({**made, field: value})
    if plain:
        field = random.choice(plain)
        return f"What is the {field}?", f"The {field} is {made[field]}."
    return f"Only the {field}.", json.dumps({field: made[field]})


def given(random: Random) -> list[Exchange]:
    """Records of values that the user gives, which only need to be copied."""
    name = random.choice(NAMES) if random.random() < 0.95 else capitalized(made_up(random))
    facts: list[tuple[str, Any, str]] = [
        ("age", value := random.randint(1, 90), f"is {value} years old"),
        ("city", place := random.choice(CITIES), f"lives in {place}"),
        ("job", job := random.choice(JOBS), f"is {a(job)}"),
        ("hobby", hobby := random.choice(HOBBIES), f"likes {hobby}"),
    ]
    chosen = random.sample(facts, random.randint(1, 3))
    made = {"name": name} | {field: value for field, value, _ in chosen}
    if random.random() < 0.6:
        stated = f"{name} {listed([text for _, _, text in chosen])}."
        asked = random.choice(
            (
                "Put this in JSON: {}",
                "{} Write that as JSON.",
                "Turn this into JSON: {}",
                "{} Give me JSON.",
                "To JSON: {}",
            )
        )
        return [(asked.format(stated), json.dumps(made))]
    pairs = ", ".join(f"{field} {value}" for field, value in made.items())
    asked = random.choice(
        ("Write JSON with {}.", "Make a JSON record: {}", "JSON with {}", "Give me a JSON record with {}.")
    )
    return [(asked.format(pairs), json.dumps(made))]


def lists(random: Random) -> list[Exchange]:
    """Arrays of words or of records."""
    count = random.randint(2, 4)
    shown = NUMBERS[count] if random.random() < 0.7 else str(count)
    if random.random() < 0.5:
        what, values = random.choice(
            (("colors", COLORS), ("animals", ANIMALS), ("cities", CITIES), ("names", NAMES), ("fruits", FRUITS))
        )
        asked = random.choice(
            ("Give me a JSON list of {} {}.", "Write {1} {0} as a JSON list.", "A JSON array of {} {}")
        )
        asked = asked.replace("{1} {0}", "{} {}")
        return [(asked.format(shown, what), json.dumps(random.sample(values, count)))]
    kind = random.choice(("person", "user", "book", "pet", "product", "city"))
    fields = _fields(random, kind, most=3)
    many = PLURALS.get(kind, f"{kind}s")
    count = min(count, 3)
    shown = NUMBERS[count] if random.random() < 0.7 else str(count)
    asked = random.choice(
        (
            "Give me a JSON list of {} {} with {}.",
            "Write {} {} as a JSON list, with {}.",
            "A JSON array of {} {} with {}",
        )
    )
    made = [record(random, kind, fields) for _ in range(count)]
    return [(asked.format(shown, many, _named(random, fields)), json.dumps(made))]
