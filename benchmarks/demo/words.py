# SPDX-License-Identifier: Apache-2.0
"""The words that the training text is made of, and the small grammar that joins them."""

from collections.abc import Sequence
from random import Random

GIRLS = (
    *("Anna", "Mia", "Lily", "Emma", "Nora", "Clara", "Ruby", "Ella", "Zoe", "Ida", "Rosa", "Maya", "Eva", "Lena"),
    *("Alice", "Grace", "Sara", "Julia", "Hana", "Tara"),
)
BOYS = (
    *("Tom", "Ben", "Max", "Leo", "Sam", "Jack", "Noah", "Finn", "Paul", "Oscar", "Hugo", "Adam", "Luke", "Ravi"),
    *("Omar", "Felix", "Theo", "David", "Peter", "Bob"),
)
NAMES = GIRLS + BOYS
PET_NAMES = ("Pip", "Luna", "Rusty", "Coco", "Milo", "Daisy", "Biscuit", "Willow", "Bruno", "Pepper", "Toby", "Bella")
ANIMALS = (
    *("fox", "rabbit", "bear", "mouse", "owl", "cat", "dog", "hedgehog", "squirrel", "frog", "duck", "horse", "cow"),
    *("pig", "sheep", "goat", "lion", "tiger", "elephant", "monkey", "penguin", "whale", "turtle", "bee", "wolf"),
    *("deer", "hen", "donkey", "snail", "ant"),
)
HEROES = (
    *ANIMALS,
    *("dragon", "robot", "giant", "wizard", "queen", "king", "prince", "princess", "sailor", "baker", "farmer"),
    *("painter", "knight", "fairy", "pirate", "ghost", "snowman", "train", "boat", "cloud", "star", "tree", "teapot"),
    *("dinosaur", "unicorn", "monster", "spider", "butterfly", "parrot", "kitten", "puppy"),
)
THINGS = (
    *("ball", "kite", "book", "key", "boat", "lamp", "hat", "drum", "bell", "box", "map", "coin", "stone", "shell"),
    *("basket", "blanket", "cake", "apple", "flower", "feather", "mirror", "clock", "button", "spoon", "scarf"),
    *("whistle", "ladder", "bucket", "letter", "ring"),
)
PLACES = {  # and how to be there
    **{
        "the forest": "in",
        "the garden": "in",
        "the village": "in",
        "the beach": "at",
        "the farm": "on",
        "the park": "in",
    },
    **{"the mountains": "in", "the town": "in", "the lake": "by", "the river": "by", "the castle": "in"},
    **{"the meadow": "in", "the harbour": "at", "the city": "in", "the hills": "in", "the island": "on"},
}
COLORS = ("red", "blue", "green", "yellow", "orange", "purple", "brown", "black", "white", "pink", "grey", "golden")
FRUITS = ("apple", "banana", "pear", "plum", "cherry", "grape", "lemon", "orange", "peach", "mango")
FOODS = ("bread", "soup", "rice", "cheese", "pasta", "salad", "pizza", "cake", "honey", "pancakes", "porridge")
JOBS = (
    *("baker", "teacher", "doctor", "farmer", "nurse", "pilot", "painter", "gardener", "driver", "engineer", "cook"),
    *("writer", "singer", "builder"),
)
HOBBIES = (
    *("reading", "swimming", "chess", "painting", "cooking", "dancing", "running", "fishing", "singing", "gardening"),
    *("cycling", "football"),
)
CAPITALS = {
    **{"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "England": "London"},
    **{"Portugal": "Lisbon", "Austria": "Vienna", "Greece": "Athens", "Norway": "Oslo", "Sweden": "Stockholm"},
    **{"Finland": "Helsinki", "Denmark": "Copenhagen", "Poland": "Warsaw", "Ireland": "Dublin", "Japan": "Tokyo"},
    **{"China": "Beijing", "India": "New Delhi", "Egypt": "Cairo", "Kenya": "Nairobi", "Canada": "Ottawa"},
    **{"Brazil": "Brasilia", "Peru": "Lima", "Cuba": "Havana", "Russia": "Moscow", "Hungary": "Budapest"},
    **{"Belgium": "Brussels", "Turkey": "Ankara", "Mexico": "Mexico City", "Iceland": "Reykjavik"},
    **{"Switzerland": "Bern", "the Netherlands": "Amsterdam", "the United States": "Washington"},
}
CITIES = tuple(CAPITALS.values())
COUNTRIES = tuple(CAPITALS)
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def a(noun: str) -> str:
    """The noun with its article."""
    return f"an {noun}" if noun[0] in "aeio" or noun.startswith(("umbrella", "uncle")) else f"a {noun}"


def count(number: int, noun: str) -> str:
    return f"{number} {noun if number == 1 else plural(noun)}"


def plural(noun: str) -> str:
    irregular = {"mouse": "mice", "sheep": "sheep", "wolf": "wolves", "deer": "deer"}
    if noun in irregular:
        return irregular[noun]
    if noun.endswith("y") and noun[-2] not in "aeo":
        return f"{noun[:-1]}ies"
    return f"{noun}es" if noun.endswith(("x", "s", "ch", "sh")) else f"{noun}s"


def listed(items: Sequence[str], last: str = "and") -> str:
    """One, two and three."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} {last} {items[-1]}"


def capitalized(text: str) -> str:
    return text[:1].upper() + text[1:]


def made_up(random: Random) -> str:
    """An invented word."""
    count = random.randint(2, 3)
    parts = (random.choice("bdfgklmnprstvz") + random.choice("aeiou") for _ in range(count))
    return "".join(parts) + random.choice(("", "", "n", "r", "x", "st"))
