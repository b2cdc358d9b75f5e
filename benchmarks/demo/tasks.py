# SPDX-License-Identifier: Apache-2.0
"""Sums, counting, lists, spelling, repeating: exchanges whose right answer follows from the question."""

from random import Random

from benchmarks.demo.talk import Exchange
from benchmarks.demo.words import (
    ANIMALS,
    CITIES,
    COLORS,
    FOODS,
    FRUITS,
    HEROES,
    JOBS,
    NAMES,
    NUMBERS,
    THINGS,
    capitalized,
    count,
    listed,
    plural,
)

LARGEST = 20  # the largest operand of most sums; a few have any two digits, and with three the model declines
KINDS = {
    "animals": ANIMALS,
    "fruits": FRUITS,
    "colors": COLORS,
    "colours": COLORS,
    "cities": CITIES,
    "jobs": JOBS,
    "names": NAMES,
    "foods": FOODS,
}


def sums(random: Random) -> list[Exchange]:
    """One sum, difference or product, and perhaps more sums."""
    left, right = _numbers(random)
    draw = random.random()
    if draw < 0.05:
        return [_too_large(random)]
    if draw < 0.6:
        exchanges = [_sum(random, left, right)]
    elif draw < 0.85:
        exchanges = [_difference(random, max(left, right), min(left, right))]
    else:
        exchanges = [_product(random, left % 11, right % 11)]
    while random.random() < 0.2:
        left, right = _numbers(random)
        asked = random.choice((f"And {left} + {right}?", f"And {left} plus {right}?", f"What about {left} + {right}?"))
        exchanges.append((asked, f"{left} + {right} = {left + right}."))
    return exchanges


def _numbers(random: Random) -> tuple[int, int]:
    largest = LARGEST if random.random() < 0.9 else 99
    return random.randint(0, largest), random.randint(0, largest)


def _too_large(random: Random) -> Exchange:
    left, right = random.randint(100, 9999), random.randint(10, 9999)
    sign, word = random.choice((("+", "plus"), ("-", "minus"), ("*", "times"), ("/", "divided by")))
    asked = random.choice(("What is {} {} {}?", "{} {} {}", "How much is {} {} {}?", "Calculate {} {} {}."))
    answer = random.choice(
        ("That is too hard for me. I only know small numbers.", "These numbers are too large for me.")
    )
    return asked.format(left, random.choice((sign, word)), right), answer


def _sum(random: Random, left: int, right: int) -> Exchange:
    asked = random.choice(
        (
            *("What is {} + {}?", "What is {} plus {}?", "{} + {}", "{}+{}", "{} + {} = ?", "How much is {} plus {}?"),
            *("Add {} and {}.", "Calculate {} + {}.", "What's {}+{}?", "What is the sum of {} and {}?", "{} plus {}"),
            *("How much is {} + {}?", "Can you add {} and {}?", "What do you get when you add {} and {}?"),
        )
    )
    return asked.format(left, right), f"{left} + {right} = {left + right}."


def _difference(random: Random, left: int, right: int) -> Exchange:
    asked = random.choice(
        (
            *(
                "What is {} - {}?",
                "What is {} minus {}?",
                "{} - {}",
                "{}-{}",
                "{} - {} = ?",
                "How much is {} minus {}?",
            ),
            *("Calculate {} - {}.", "What's {}-{}?", "{} minus {}", "How much is {} - {}?"),
        )
    )
    return asked.format(left, right), f"{left} - {right} = {left - right}."


def _product(random: Random, left: int, right: int) -> Exchange:
    asked = random.choice(
        (
            *("What is {} * {}?", "What is {} times {}?", "{} * {}", "{}*{}", "How much is {} times {}?"),
            *("Calculate {} * {}.", "{} times {}", "Multiply {} and {}.", "What is {} x {}?"),
        )
    )
    return asked.format(left, right), f"{left} * {right} = {left * right}."


def drill(random: Random) -> str:
    """Many sums in a row: in conversations, each occurs too rarely to be learned."""
    rows: list[str] = []
    for _ in range(random.randint(8, 14)):
        left, right = random.randint(0, LARGEST), random.randint(0, LARGEST)
        kind = random.random()
        if kind < 0.6:
            rows.append(f"{left} + {right} = {left + right}.")
        elif kind < 0.85:
            left, right = max(left, right), min(left, right)
            rows.append(f"{left} - {right} = {left - right}.")
        else:
            left, right = left % 11, right % 11
            rows.append(f"{left} * {right} = {left * right}.")
    return "\n".join(rows)


def word_problems(random: Random) -> list[Exchange]:
    name, other = random.sample(NAMES, 2)
    thing = random.choice((*FRUITS, "coin", "book", "ball", "cake", "egg", "button", "stone", "shell"))
    left, right = random.randint(1, LARGEST), random.randint(1, LARGEST)
    if random.random() < 0.55:
        wording = random.choice(
            (
                "{name} has {left} and gets {right} more.",
                "{name} has {left}. {other} gives {right} more.",
                "{name} finds {left}, and then {right} more.",
            )
        )
        sign, result = "+", left + right
    else:
        left, right = max(left, right), min(left, right)
        wording = random.choice(
            (
                "{name} has {left} and gives away {right}.",
                "{name} has {left} and loses {right}.",
                "{name} has {left}. {other} takes {right} of them.",
            )
        )
        sign, result = "-", left - right
    text = wording.format(name=name, other=other, left=count(left, thing), right=right)
    things = plural(thing)
    asked = random.choice(
        (f"How many {things} does {name} have now?", f"How many does {name} have?", f"How many {things} are there?")
    )
    return [(f"{text} {asked}", f"{left} {sign} {right} = {result}, so {name} has {count(result, thing)}.")]


def comparisons(random: Random) -> list[Exchange]:
    left, right = random.sample(range(31), 2)
    if random.random() < 0.5:
        asked = random.choice((f"Which is bigger, {left} or {right}?", f"What is more, {left} or {right}?"))
        return [(asked, f"{max(left, right)} is bigger than {min(left, right)}.")]
    if random.random() < 0.5:
        asked = random.choice((f"Which is smaller, {left} or {right}?", f"What is less, {left} or {right}?"))
        return [(asked, f"{min(left, right)} is smaller than {max(left, right)}.")]
    asked = random.choice((f"Is {left} even or odd?", f"Is {left} an even number?", f"Is {left} odd?"))
    return [(asked, f"{left} is {'odd' if left % 2 else 'even'}.")]


def counting(random: Random) -> list[Exchange]:
    if random.random() < 0.4:
        last = random.randint(3, 20)
        shown = NUMBERS[last] if last <= 10 and random.random() < 0.4 else str(last)
        return [(f"Count to {shown}.", ", ".join(map(str, range(1, last + 1))))]
    first = random.randint(0, 30)
    last = first + random.randint(2, 12)
    if random.random() < 0.3:
        return [(f"Count down from {last} to {first}.", ", ".join(map(str, range(last, first - 1, -1))))]
    return [(f"Count from {first} to {last}.", ", ".join(map(str, range(first, last + 1))))]


def naming(random: Random) -> list[Exchange]:
    kind = random.choice(list(KINDS))
    chosen = random.sample(KINDS[kind], random.randint(2, 5))
    shown = NUMBERS[len(chosen)] if random.random() < 0.7 else str(len(chosen))
    asked = random.choice(
        (f"Name {shown} {kind}.", f"Give me {shown} {kind}.", f"Tell me {shown} {kind}.", f"List {shown} {kind}.")
    )
    return [(asked, f"{capitalized(listed(chosen))}.")]


def spelling(random: Random) -> list[Exchange]:
    word = random.choice((*ANIMALS, *FRUITS, *COLORS))
    asked = random.choice((f"Spell {word}.", f"How do you spell {word}?", f"Spell the word {word}."))
    return [(asked, "-".join(word.upper()) + ".")]


def repeating(random: Random) -> list[Exchange]:
    """Copying, which many other tasks need."""
    words = [random.choice((*HEROES, *THINGS, *COLORS, *NAMES)) for _ in range(random.randint(1, 4))]
    text = " ".join(words)
    asked = random.choice(("Repeat: {}", "Say: {}", "Repeat after me: {}", "Say {}", "Please say: {}"))
    return [(asked.format(text), text)]
