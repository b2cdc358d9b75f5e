# SPDX-License-Identifier: Apache-2.0
"""Short stories: a hero, a place, a thing, and one of a few plots, each sentence in one of several wordings."""

from dataclasses import dataclass
from random import Random

from benchmarks.demo.talk import Exchange
from benchmarks.demo.words import (
    ANIMALS,
    BOYS,
    COLORS,
    FOODS,
    GIRLS,
    HEROES,
    PET_NAMES,
    PLACES,
    THINGS,
    a,
    capitalized,
    made_up,
)

MOODS = ("small", "brave", "kind", "curious", "shy", "clever", "happy", "lazy", "proud", "young", "old", "tiny")
TIMES = (
    "One day",
    "One morning",
    "One evening",
    "One sunny day",
    "One rainy day",
    "One cold night",
    "One day in spring",
)

# Each plot is a list of sentences, each a choice of wordings.
PLOTS: tuple[tuple[tuple[str, ...], ...], ...] = (
    (  # lost and found
        (
            "{time}, {name} lost {his} {color} {thing}.",
            "{time}, {name} could not find {his} {color} {thing}.",
            "{time}, the {color} {thing} of {name} was gone.",
        ),
        (
            "{He} looked under the bed and behind the door, but it was not there.",
            "{He} looked everywhere, but there was no {thing}.",
            "{He} searched all day long and was very sad.",
        ),
        (
            'Then {a_friend} named {friend} came by and said, "I will help you."',
            'Then {he} met {a_friend} called {friend}, who said, "Let us look together."',
        ),
        (
            "They found the {thing} near {place}, under a big tree.",
            "Together they found the {thing} in the tall grass.",
            "Soon {friend} saw the {thing} on top of a stone.",
        ),
        (
            "{name} was so happy that {he} danced.",
            "{name} thanked {friend}, and they shared some {food}.",
            '"Thank you!" said {name}, and gave {friend} a hug.',
        ),
    ),
    (  # a friend is made
        (
            "{name} had no friends and often felt alone.",
            "{name} wanted a friend more than anything.",
            "Every day {name} played alone.",
        ),
        (
            "{time}, {he} met {a_friend} named {friend}.",
            "{time}, {a_friend} called {friend} came to {place}.",
        ),
        (
            "{friend} was afraid at first, but {name} smiled and shared {his} {food}.",
            '"Do you want to play with my {thing}?" asked {name}.',
            "{name} showed {friend} {his} {color} {thing}, and they began to play.",
        ),
        (
            "They played until the sun went down.",
            "They laughed and ran and jumped all day.",
            "They talked for a long time and ate {food}.",
        ),
        (
            "From that day on, {name} and {friend} were best friends.",
            "Since then, {name} has never been alone again.",
        ),
    ),
    (  # a storm
        (
            "{time}, a big storm came to {place}.",
            "{time}, the wind began to blow and the rain fell hard.",
        ),
        (
            "{name} was afraid and hid under {a_thing}.",
            "{name} heard a small voice that called for help.",
            "{name} saw {a_friend} named {friend} who had no place to go.",
        ),
        (
            '"Come in!" said {name} to {friend}, {a_friend} who was cold and wet.',
            "{He} opened the door and let in {friend}, {a_friend} who was wet and cold.",
        ),
        (
            "They ate warm {food} and told each other stories.",
            "They sat by the fire and ate {food}.",
        ),
        (
            "In the morning the sun was shining, and the storm was over.",
            "When the storm was over, they saw a rainbow over {place}.",
        ),
        (
            "{name} was glad that {he} had been kind.",
            '"You are a good friend," said {friend}.',
        ),
    ),
    (  # learning something
        (
            "{name} wanted to learn how to {skill}.",
            "More than anything, {name} wanted to {skill}.",
        ),
        (
            "{He} tried and tried, but it was too hard.",
            "The first time {he} tried, {he} fell and everybody laughed.",
        ),
        (
            '{A_friend} named {friend} said, "Do not give up. Try it once more."',
            '"You can do it," said {friend}, {a_friend} who lived nearby.',
        ),
        (
            "So {name} practised every day.",
            "So {he} tried again, a little better each time.",
        ),
        (
            "{time}, {name} could {skill} better than anyone {at_place}.",
            "At last {name} could {skill}, and everybody clapped.",
        ),
        (
            "{name} was very proud.",
            '"I did it!" said {name}.',
        ),
    ),
    (  # finding a thing that belongs to somebody else
        (
            "{time}, {name} found {a_color_thing} {at_place}.",
            "{time}, {name} saw {a_color_thing} on the road.",
        ),
        (
            '"What a nice {thing}!" said {name}. "But whose is it?"',
            "{He} wanted to keep it, but then {he} thought that somebody must miss it.",
        ),
        (
            "{He} asked everyone {at_place}, and nobody knew.",
            "{He} walked a long way and asked all the people.",
        ),
        (
            "At last {he} met {a_friend} named {friend}, who was crying.",
            'Then {he} heard {a_friend} named {friend} say, "I have lost my {thing}."',
        ),
        (
            "{name} gave back the {thing}, and {friend} smiled again.",
            '"Here is your {thing}," said {name}, and {friend} was happy.',
        ),
        (
            "They ate {food} together and became friends.",
            "That night {name} slept very well.",
        ),
    ),
    (  # an adventure
        (
            "{time}, {name} went on a journey with {a_color_thing}.",
            "{time}, {name} left home to see the world.",
        ),
        (
            "{He} walked past {place} and over a high hill.",
            "{He} went over a bridge and through a dark wood.",
        ),
        (
            "There {he} met {a_friend} named {friend}, who was hungry, and gave {friend} some {food}.",
            "On the way {he} helped {a_friend} named {friend} out of a deep hole.",
        ),
        (
            '"Thank you," said {friend}. "I will show you something."',
            "To thank {him}, {friend} showed {him} a secret place.",
        ),
        (
            "It was a garden full of {color} flowers.",
            "It was a cave full of {color} stones that shone like stars.",
        ),
        (
            "{name} came home with many stories to tell.",
            "When {name} came home, {he} was tired but happy.",
        ),
    ),
    (  # sharing
        (
            "{name} had a lot of {food}, but {he} did not want to share it.",
            "{name} had made some {food} and wanted to eat it all alone.",
        ),
        (
            "{time}, {a_friend} named {friend} came and asked for some.",
            "{time}, {friend}, {a_friend} from {place}, came by and was hungry.",
        ),
        (
            '"No," said {name}, and {friend} went away sadly.',
            '"It is mine!" said {name}, so {friend} left.',
        ),
        (
            "But the {food} did not taste good, because {name} felt alone.",
            "Then {name} felt sorry and ran after {friend}.",
        ),
        (
            '"Come back," {he} called. "There is enough for two."',
            "So {he} called {friend} back, and they ate the {food} together.",
        ),
        (
            "Now it tasted better than ever.",
            "{name} learned that sharing makes everything better.",
        ),
    ),
)
SKILLS = ("swim", "fly a kite", "sing", "dance", "ride a bike", "climb trees", "bake bread", "paint", "read", "skate")
OPENINGS = (
    "Once upon a time there was {a_mood_hero} named {name}, who lived {at_place}.",
    "There once was {a_mood_hero} called {name}. {He} lived {at_place}.",
    "{At_place} there lived {a_mood_hero} named {name}.",
    "Once there was {a_mood_hero} {at_place}. {His} name was {name}.",
    "{name} was {a_mood_hero} who lived {at_place}.",
)
ENDINGS = ("The end.", "And they all lived happily ever after.", "", "", "")
CHILDREN = ("girl", "boy")


@dataclass(frozen=True, kw_only=True)
class Cast:
    hero: str
    name: str
    place: str
    thing: str
    friend: str
    friend_kind: str
    male: bool

    @property
    def at_place(self) -> str:
        return f"{PLACES[self.place]} {self.place}"


def cast(random: Random) -> Cast:
    draw = random.random()
    # Unknown words teach the model to copy what the user says.
    hero = made_up(random) if draw < 0.02 else random.choice(HEROES) if draw < 0.8 else random.choice(CHILDREN)
    male = random.random() < 0.5
    if hero in (*CHILDREN, "king", "queen", "prince", "princess"):
        male = hero in ("boy", "king", "prince")
    pool = BOYS if male else GIRLS
    if hero in ANIMALS and random.random() < 0.5:
        pool = PET_NAMES
    name = random.choice(pool) if random.random() < 0.97 else capitalized(made_up(random))
    friend = random.choice([other for other in (*PET_NAMES, *GIRLS, *BOYS) if other != name])
    kind = random.choice([animal for animal in ANIMALS if animal != hero])
    return Cast(
        hero=hero,
        name=name,
        place=random.choice(list(PLACES)),
        thing=random.choice([thing for thing in THINGS if thing != hero]),
        friend=friend,
        friend_kind=kind,
        male=male,
    )


def story(random: Random, cast: Cast, *, with_thing: bool = False) -> str:
    """`with_thing`: the story must mention the thing."""
    color, mood = random.choice(COLORS), random.choice(MOODS)
    he, his, him = ("he", "his", "him") if cast.male else ("she", "her", "her")
    words = {
        **{"name": cast.name, "place": cast.place, "thing": cast.thing, "friend": cast.friend, "color": color},
        **{"he": he, "his": his, "him": him, "He": he.capitalize(), "His": his.capitalize()},
        **{"a_mood_hero": a(f"{mood} {cast.hero}"), "a_friend": a(cast.friend_kind), "a_thing": a(cast.thing)},
        **{"A_friend": capitalized(a(cast.friend_kind)), "a_color_thing": a(f"{color} {cast.thing}")},
        **{"at_place": cast.at_place, "At_place": capitalized(cast.at_place)},
        **{"time": random.choice(TIMES), "food": random.choice(FOODS), "skill": random.choice(SKILLS)},
    }
    plots = [plot for plot in PLOTS if not with_thing or "thing}" in " ".join(plot[0])]
    plot = random.choice(plots)
    sentences = [random.choice(OPENINGS), *(random.choice(wordings) for wordings in plot), random.choice(ENDINGS)]
    if with_thing and plot[0][0].startswith("{time}, {name} went"):
        sentences[1] = plot[0][0]  # the wording that mentions the thing
    return " ".join(capitalized(sentence.format(**words)) for sentence in sentences if sentence)


def stories(random: Random) -> list[Exchange]:
    """A story, requested in one of many ways, and perhaps a question about it."""
    chosen = cast(random)
    asked, with_thing = _request(random, chosen)
    exchanges = [(asked, story(random, chosen, with_thing=with_thing))]
    if random.random() < 0.3:
        exchanges.append(_question(random, chosen))
    elif random.random() < 0.15:
        chosen = cast(random)
        asked = random.choice(("Another one.", "Another story, please.", "One more story", "Tell me another one."))
        exchanges.append((asked, story(random, chosen)))
    return exchanges


def _request(random: Random, chosen: Cast) -> tuple[str, bool]:
    start = random.choice(
        (
            *("Tell me a story", "Tell me a short story", "Write a story", "Write a short story", "I want a story"),
            *("Can you tell me a story", "Tell a story", "Give me a story", "Make up a story"),
        )
    )
    hero = a(chosen.hero)
    draw = random.random()
    if draw < 0.15:
        return f"{start}.", False
    if draw < 0.45:
        return f"{start} about {hero}.", False
    if draw < 0.7:
        return f"{start} about {hero} {random.choice(('named', 'called'))} {chosen.name}.", False
    if draw < 0.8:
        return f"{start} about {hero} and {a(chosen.thing)}.", True
    if draw < 0.9:
        return f"{start} about {hero} {chosen.at_place}.", False
    return f"{start} about {chosen.name} the {chosen.hero}.", False


def _question(random: Random, chosen: Cast) -> Exchange:
    asked, answer = random.choice(
        (
            (f"What was the name of the {chosen.hero}?", f"The name of the {chosen.hero} was {chosen.name}."),
            (f"Where did {chosen.name} live?", f"{chosen.name} lived {chosen.at_place}."),
            ("Who is the story about?", f"The story is about {a(chosen.hero)} named {chosen.name}."),
            (f"Who was {chosen.name}?", f"{chosen.name} was {a(chosen.hero)}."),
        )
    )
    return asked, answer


VERSES = {
    "the sea": "The sea is wide, the sea is blue,\nIt sings its song for me and you.",
    "the sun": "The sun comes up, the sun goes down,\nIt warms the fields, it warms the town.",
    "the moon": "The moon is round, the moon is bright,\nIt walks with me all through the night.",
    "a cat": "The little cat sat on the mat,\nAnd wore a very little hat.",
    "winter": "The snow falls soft, the snow falls slow,\nAnd all the world is white below.",
    "rain": "The rain falls down, the rain falls fast,\nBut every shower ends at last.",
    "a tree": "The tree is tall, the tree is green,\nThe oldest thing I've ever seen.",
    "love": "The rose is red, the sky is blue,\nAnd all my words are meant for you.",
}


ANY_VERSES = (
    "I saw {one} upon a hill,\nAnd in my dreams I see it still.",
    "{One} came by one summer day,\nAnd said hello and went away.",
    "Oh {word}, dear {word}, where have you been?\nYou are the best I've ever seen.",
)


def verses(random: Random) -> list[Exchange]:
    draw = random.random()
    topic = random.choice(list(VERSES))
    asked = random.choice(("Write a poem about {}.", "A poem about {}, please.", "Tell me a poem about {}."))
    if draw < 0.2:
        asked = random.choice(("Write a poem.", "Tell me a poem.", "Do you know a poem?"))
    if draw < 0.5:
        return [(asked.format(topic), VERSES[topic])]
    word = random.choice((*HEROES, *THINGS))
    answer = random.choice(ANY_VERSES).format(word=word, one=a(word), One=capitalized(a(word)))
    return [(asked.format(a(word)), answer)]
