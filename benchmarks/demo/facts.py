# SPDX-License-Identifier: Apache-2.0
"""Simple questions and their answers: the few facts that the demo model knows."""

from random import Random

from benchmarks.demo.talk import Exchange
from benchmarks.demo.words import CAPITALS, a, capitalized, made_up, plural

SOUNDS = {
    **{"cat": "meow", "dog": "woof", "cow": "moo", "sheep": "baa", "duck": "quack", "pig": "oink", "lion": "roar"},
    **{"bee": "buzz", "frog": "croak", "owl": "hoot", "mouse": "squeak", "horse": "neigh", "wolf": "howl"},
    **{"hen": "cluck", "snake": "hiss"},
}
YOUNG = {
    **{"cat": "kitten", "dog": "puppy", "cow": "calf", "sheep": "lamb", "duck": "duckling", "pig": "piglet"},
    **{"lion": "cub", "bear": "cub", "horse": "foal", "hen": "chick", "frog": "tadpole", "goat": "kid"},
    **{"deer": "fawn", "owl": "owlet", "goose": "gosling"},
}
LEGS = {
    **{"cat": 4, "dog": 4, "cow": 4, "horse": 4, "duck": 2, "hen": 2, "owl": 2, "bee": 6, "ant": 6, "spider": 8},
    **{"snake": 0, "fish": 0, "fox": 4, "elephant": 4, "penguin": 2, "frog": 4, "butterfly": 6, "person": 2},
}
LEG_WORDS = {0: "no", 2: "two", 4: "four", 6: "six", 8: "eight"}
FOOD = {
    **{"rabbit": "carrots and grass", "cow": "grass", "bear": "berries and fish", "cat": "fish and mice"},
    **{"monkey": "bananas", "squirrel": "nuts", "horse": "hay and grass", "owl": "mice", "penguin": "fish"},
    **{"bee": "nectar", "frog": "flies", "lion": "meat", "panda": "bamboo", "mouse": "cheese and seeds"},
    **{"goat": "leaves and grass", "duck": "plants and snails"},
}
HOMES = {
    **{"bee": "a hive", "bird": "a nest", "fox": "a den", "rabbit": "a burrow", "dog": "a kennel", "fish": "water"},
    **{"spider": "a web", "horse": "a stable", "cow": "a barn", "lion": "the savanna", "penguin": "cold places"},
    **{"whale": "the sea", "owl": "a tree", "bear": "a cave", "ant": "an anthill", "camel": "the desert"},
}
OPPOSITES = (
    *(("hot", "cold"), ("big", "small"), ("up", "down"), ("day", "night"), ("happy", "sad"), ("fast", "slow")),
    *(("old", "young"), ("new", "old"), ("open", "closed"), ("full", "empty"), ("light", "dark"), ("wet", "dry")),
    *(("high", "low"), ("long", "short"), ("hard", "soft"), ("rich", "poor"), ("left", "right"), ("good", "bad")),
    *(("loud", "quiet"), ("early", "late"), ("strong", "weak"), ("clean", "dirty"), ("true", "false")),
    *(("inside", "outside"), ("black", "white"), ("love", "hate"), ("thick", "thin"), ("near", "far")),
    *(("first", "last"), ("start", "end"), ("sweet", "sour"), ("deep", "shallow"), ("push", "pull"), ("yes", "no")),
)
COLORS_OF = {
    **{
        "the sky": "blue",
        "grass": "green",
        "snow": "white",
        "a banana": "yellow",
        "a tomato": "red",
        "the sun": "yellow",
    },
    **{
        "the sea": "blue",
        "coal": "black",
        "a carrot": "orange",
        "a lemon": "yellow",
        "milk": "white",
        "a strawberry": "red",
    },
    **{"chocolate": "brown", "a leaf": "green", "a cherry": "red", "the night": "black", "a frog": "green"},
    **{"blood": "red", "a polar bear": "white", "a pumpkin": "orange", "a cucumber": "green", "an elephant": "grey"},
}
WHAT_IS = {
    **{
        "a dog": "an animal that barks and likes to be with people",
        "a cat": "a small animal that purrs and catches mice",
    },
    **{"a tree": "a tall plant with a trunk and leaves", "a river": "water that flows through the land to the sea"},
    **{"the sun": "a star that gives us light and warmth", "the moon": "a ball of rock that goes around the earth"},
    **{"rain": "water that falls from clouds", "snow": "frozen water that falls from clouds in winter"},
    **{"a book": "many pages of text between two covers", "a house": "a building that people live in"},
    **{"a bird": "an animal with wings and feathers", "a fish": "an animal that lives in water and has fins"},
    **{"a boat": "a thing that carries people over water", "bread": "food that is baked from flour and water"},
    **{"a baker": "a person who makes bread and cakes", "a teacher": "a person who helps others to learn"},
    **{"a doctor": "a person who helps sick people", "a farmer": "a person who grows food and keeps animals"},
    **{
        "a clock": "a thing that shows the time",
        "a key": "a thing that opens a lock",
        "honey": "sweet food made by bees",
    },
    **{"ice": "frozen water", "a king": "a man who rules a country", "a queen": "a woman who rules a country"},
    **{
        "a forest": "a place with many trees",
        "a desert": "a dry place with a lot of sand",
        "a bee": "an insect that makes honey",
    },
    **{"a computer": "a machine that works with numbers and text", "a robot": "a machine that can do work by itself"},
    **{"a language model": "a program that has learned to write text", "a token": "a piece of text that a model reads"},
    **{
        "an island": "land with water all around it",
        "a mountain": "a very high piece of land",
        "JSON": "a way to write data as text",
    },
    **{"a dragon": "an animal in stories that can fly and breathe fire", "JAX": "a Python library for fast numbers"},
    **{"an apple": "a round fruit that grows on trees", "milk": "a white drink that comes from cows"},
}
USES = {
    **{
        "an umbrella": "to stay dry in the rain",
        "a spoon": "to eat soup",
        "a key": "to open a door",
        "a lamp": "to give light",
    },
    **{
        "a clock": "to tell the time",
        "a pen": "to write",
        "a bed": "to sleep",
        "a boat": "to cross water",
        "soap": "to wash",
    },
    **{
        "a hammer": "to hit nails",
        "a map": "to find the way",
        "a ladder": "to climb up high",
        "a broom": "to sweep the floor",
    },
    **{
        "a hat": "to keep your head warm",
        "scissors": "to cut paper",
        "a fridge": "to keep food cold",
        "a bag": "to carry things",
    },
    **{"glasses": "to see better", "a towel": "to get dry", "a telescope": "to look at the stars"},
}
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    *("January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November"),
    "December",
)
SEASONS = ("spring", "summer", "autumn", "winter")
SINGLE = (
    (("How many days are in a week?", "How many days does a week have?"), "A week has seven days."),
    (("How many months are in a year?", "How many months does a year have?"), "A year has twelve months."),
    (("How many hours are in a day?", "How many hours does a day have?"), "A day has 24 hours."),
    (("How many minutes are in an hour?", "How many minutes does an hour have?"), "An hour has 60 minutes."),
    (("How many days are in a year?", "How many days does a year have?"), "A year has 365 days."),
    (("Name the seasons.", "What are the seasons?"), "The seasons are spring, summer, autumn and winter."),
    (
        ("Name the days of the week.", "What are the days of the week?"),
        f"The days are {', '.join(DAYS[:6])} and Sunday.",
    ),
    (("What planet do we live on?", "On which planet do we live?"), "We live on the planet Earth."),
    (("What is the largest planet?", "Which planet is the biggest?"), "Jupiter is the largest planet."),
    (("What is the largest animal?", "Which animal is the biggest?"), "The blue whale is the largest animal."),
    (("What is the fastest animal?", "Which land animal runs fastest?"), "The cheetah is the fastest animal on land."),
    (("What is the tallest animal?", "Which animal is the tallest?"), "The giraffe is the tallest animal."),
    (("What is the highest mountain?", "Which mountain is the highest?"), "Mount Everest is the highest mountain."),
    (("What do bees make?", "What does a bee make?"), "Bees make honey."),
    (("Where does milk come from?", "Who gives us milk?"), "Milk comes from cows."),
    (("Why is the sky blue?", "What makes the sky blue?"), "The air scatters blue light more than red light."),
    (("Why do we sleep?", "Why do people sleep?"), "We sleep so that the body and the mind can rest."),
    (("What is water made of?", "What is in water?"), "Water is made of hydrogen and oxygen."),
    (("When does water freeze?", "At what temperature does water freeze?"), "Water freezes at 0 degrees."),
    (("When does water boil?", "At what temperature does water boil?"), "Water boils at 100 degrees."),
    (("What color do red and blue make?", "What do you get from red and blue?"), "Red and blue make purple."),
    (("What color do yellow and blue make?", "What do you get from yellow and blue?"), "Yellow and blue make green."),
    (("What color do red and yellow make?", "What do you get from red and yellow?"), "Red and yellow make orange."),
)


def capitals(random: Random) -> list[Exchange]:
    exchanges: list[Exchange] = []
    for country in random.sample(list(CAPITALS), random.choice((1, 1, 1, 2, 3))):
        first = (
            "What is the capital of {}?",
            "Which city is the capital of {}?",
            "What's the capital of {}?",
            "Name the capital of {}.",
            "capital of {}",
        )
        later = ("And of {}?", "What about {}?", "And the capital of {}?")
        if random.random() < 0.05:
            country = capitalized(made_up(random))
        city = CAPITALS.get(country)
        asked = random.choice(later if exchanges else first).format(country)
        answer = f"The capital of {country} is {city}." if city else f"I do not know the capital of {country}."
        exchanges.append((asked, answer))
    if random.random() < 0.15:
        country = random.choice(list(CAPITALS))
        city = CAPITALS[country]
        asked = random.choice((f"Where is {city}?", f"In which country is {city}?"))
        exchanges.append((asked, f"{city} is in {country}. It is the capital."))
    return exchanges


def animals(random: Random) -> list[Exchange]:
    match random.randrange(5):
        case 0:
            animal, sound = random.choice(list(SOUNDS.items()))
            asked = random.choice(("What does {} say?", "What sound does {} make?", "What noise does {} make?"))
            return [(asked.format(a(animal)), f"{capitalized(a(animal))} says {sound}.")]
        case 1:
            animal, young = random.choice(list(YOUNG.items()))
            asked = random.choice(
                (f"What is a baby {animal} called?", f"What do you call a baby {animal}?", f"What is a young {animal}?")
            )
            return [(asked, f"A baby {animal} is called {a(young)}.")]
        case 2:
            animal, legs = random.choice(list(LEGS.items()))
            asked = random.choice((f"How many legs does {a(animal)} have?", f"How many legs has {a(animal)}?"))
            return [(asked, f"{capitalized(a(animal))} has {LEG_WORDS[legs]} legs.")]
        case 3:
            animal, food = random.choice(list(FOOD.items()))
            many = plural(animal)
            asked = random.choice(
                (f"What does {a(animal)} eat?", f"What do {many} eat?", f"What is the food of {a(animal)}?")
            )
            return [(asked, f"{capitalized(many)} eat {food}.")]
        case _:
            animal, home = random.choice(list(HOMES.items()))
            asked = random.choice((f"Where does {a(animal)} live?", f"What is the home of {a(animal)}?"))
            return [(asked, f"{capitalized(a(animal))} lives in {home}.")]


def opposites(random: Random) -> list[Exchange]:
    exchanges: list[Exchange] = []
    for pair in random.sample(OPPOSITES, random.choice((1, 1, 2))):
        word, other = pair if random.random() < 0.5 or "old" in pair else pair[::-1]
        first = (
            "What is the opposite of {}?",
            "Name the opposite of {}.",
            "opposite of {}",
            "The opposite of {} is what?",
        )
        asked = random.choice(("And of {}?", "And the opposite of {}?") if exchanges else first).format(word)
        exchanges.append((asked, f"The opposite of {word} is {other}."))
    return exchanges


def properties(random: Random) -> list[Exchange]:
    """What things look like, what they are, what they are for."""
    match random.randrange(3):
        case 0:
            thing, color = random.choice(list(COLORS_OF.items()))
            asked = random.choice((f"What color is {thing}?", f"What colour is {thing}?", f"Which colour has {thing}?"))
            return [(asked, f"{capitalized(thing)} is {color}.")]
        case 1:
            thing, meaning = random.choice(list(WHAT_IS.items()))
            asked = random.choice(
                (f"What is {thing}?", f"Tell me what {thing} is.", f"Explain what {thing} is.", f"What's {thing}?")
            )
            shown = thing if thing in ("JSON", "JAX") else capitalized(thing)
            return [(asked, f"{shown} is {meaning}.")]
        case _:
            thing, use = random.choice(list(USES.items()))
            asked = random.choice(
                (f"What is the use of {thing}?", f"What do you use {thing} for?", f"Why do we need {thing}?")
            )
            return [(asked, f"You use {thing} {use}.")]


def calendar(random: Random) -> list[Exchange]:
    what, names = random.choice((("day", DAYS), ("month", MONTHS), ("month", MONTHS), ("season", SEASONS)))
    place = random.randrange(len(names))
    if random.random() < 0.6:
        asked = random.choice(
            (
                f"What {what} comes after {names[place]}?",
                f"Which {what} follows {names[place]}?",
                f"What comes after {names[place]}?",
            )
        )
        return [(asked, f"{capitalized(names[(place + 1) % len(names)])} comes after {names[place]}.")]
    asked = random.choice((f"What {what} comes before {names[place]}?", f"What comes before {names[place]}?"))
    return [(asked, f"{capitalized(names[place - 1])} comes before {names[place]}.")]


def single(random: Random) -> list[Exchange]:
    asked, answer = random.choice(SINGLE)
    return [(random.choice(asked), answer)]
