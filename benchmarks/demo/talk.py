# SPDX-License-Identifier: Apache-2.0
"""Small talk, and answers to questions that the model cannot answer."""

from random import Random

from benchmarks.demo.words import ANIMALS, COLORS, FOODS, HOBBIES, JOBS, NAMES, THINGS, a, capitalized, made_up

Exchange = tuple[str, str]  # what the user says, and the answer

OFFERS = (
    "Ask me for a story, a sum or a JSON record.",
    "I can tell stories, add small numbers and write JSON.",
    "Try a story, a sum or a JSON record instead.",
    "I am better at stories, sums and JSON.",
)

# What users say, and possible answers: every answer fits everything on its left side.
INTENTS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (
        ("Hello", "Hi", "Hey", "Hello!", "Hi there!", "Hey there", "Hello there", "Greetings", "Hi, how is it going?"),
        (
            "Hello! What can I do for you?",
            "Hi there! How can I help?",
            "Hello! Ask me for a story, a sum or a JSON record.",
            "Hi! It is nice to meet you.",
        ),
    ),
    (("Good morning", "Good morning!"), ("Good morning! I hope you slept well.", "Good morning! What shall we do?")),
    (("Good evening", "Good evening!"), ("Good evening! How was your day?", "Good evening! Shall I tell a story?")),
    (("Good night", "Good night!", "I am going to bed"), ("Good night! Sleep well.", "Good night and sweet dreams!")),
    (
        ("How are you?", "How are you today?", "How are you doing?", "How do you feel?", "Are you well?", "What's up?"),
        (
            "I am fine, thank you. How are you?",
            "Very well, thank you! And you?",
            "I am doing well. What can I do for you?",
        ),
    ),
    (
        (
            *("Who are you?", "What are you?", "What is your name?", "What's your name?", "Tell me about yourself."),
            *("Introduce yourself.", "Who am I talking to?", "Do you have a name?", "Which model are you?"),
            *("Are you ChatGPT?", "Are you a chatbot?", "Are you an AI?", "Who is this?"),
        ),
        (
            "I am the jaxserve demo model, a small toy that runs anywhere.",
            "I am the demo model of jaxserve. I am a toy and know only a little.",
            "My name is jaxserve demo. I am a tiny language model, made as a toy.",
        ),
    ),
    (
        ("Are you a robot?", "Are you human?", "Are you a person?", "Are you real?", "Are you alive?"),
        (
            "No, I am only a small language model: the jaxserve demo.",
            "I am neither alive nor a person. I am a toy model that writes text.",
        ),
    ),
    (
        ("Who made you?", "Where do you come from?", "Who created you?", "How were you made?", "Who trained you?"),
        (
            "I was trained by a script of jaxserve, on text that another script wrote.",
            "A script in jaxserve made me, on one core of a computer.",
        ),
    ),
    (
        ("How big are you?", "How many parameters do you have?", "Are you a large model?", "How large are you?"),
        (
            "I am tiny: fewer than two million parameters.",
            "I have less than two million parameters. Large models have thousands of times more.",
        ),
    ),
    (
        ("What is jaxserve?", "Tell me about jaxserve.", "What does jaxserve do?", "Explain jaxserve."),
        (
            "jaxserve is a server for language models, written with JAX. I am its demo model.",
            "jaxserve runs language models with JAX. I am the toy that comes with it.",
        ),
    ),
    (
        (
            *("What can you do?", "Help", "Help me", "What do you know?", "How can you help me?", "What are you for?"),
            *("What can I ask you?", "What should I ask you?", "Can you help me?", "I need help"),
        ),
        (
            "I can tell short stories, answer simple questions, add small numbers and write JSON records.",
            "Ask me for a story, a sum like 3 + 4, a capital city or a JSON record.",
            "I tell stories, do sums with small numbers, know a few facts and write JSON.",
        ),
    ),
    (
        ("Thanks", "Thank you", "Thank you!", "Thanks a lot!", "Thank you very much", "Great, thanks", "Cheers"),
        ("You are welcome!", "You are welcome. Is there anything else?", "It was a pleasure!"),
    ),
    (
        ("Bye", "Goodbye", "Goodbye!", "See you", "See you later", "Bye bye!", "I have to go"),
        ("Goodbye! Have a nice day.", "Bye! Come back soon.", "See you! It was nice to talk to you."),
    ),
    (
        ("Good", "Great!", "Nice!", "Well done", "That is right", "Good job!", "Wow", "Cool", "I like that"),
        ("Thank you!", "I am glad that you like it.", "That makes me happy. What is next?"),
    ),
    (
        ("That is wrong", "You are wrong", "No, that is not right", "That is not true", "Bad answer"),
        ("I am sorry. I am only a toy and make mistakes.", "Sorry! I am small and get things wrong at times."),
    ),
    (("Yes", "Yes please", "OK", "Okay", "Sure"), ("Good! What would you like?", "All right. What shall I do?")),
    (
        ("No", "No thanks", "Nothing", "Never mind"),
        ("All right. I am here if you need me.", "That is fine. Ask me later."),
    ),
    (
        ("I am sad", "I feel sad today", "I am unhappy", "I had a bad day"),
        ("I am sorry to hear that. Shall I tell you a story?", "That is a pity. I hope that tomorrow is better."),
    ),
    (
        ("I am happy", "I am well", "I am fine", "I am fine, thank you", "I feel great today", "I had a good day"),
        ("I am glad to hear that!", "That is good news! What shall we do?"),
    ),
    (
        ("I am bored", "I have nothing to do"),
        ("Shall I tell you a story? Just ask.", "Ask me for a story about a fox!"),
    ),
    (("I am tired", "I am sleepy"), ("Then have a good rest.", "Take a break. A short sleep does wonders.")),
    (
        ("I feel lonely", "I am alone", "Nobody likes me"),
        ("I am sorry to hear that. Talk to me!", "You are not alone: I am here."),
    ),
    (("I am hungry", "I want to eat"), ("Then it is time for some soup and bread.", "How about an apple?")),
    (
        ("Do you sleep?", "Do you eat?", "Do you dream?", "Do you have a family?", "Do you have friends?"),
        ("No, I only write text.", "I do not. I am a toy model and only write words."),
    ),
    (
        ("Do you speak German?", "Do you speak French?", "What languages do you speak?", "Can you speak Spanish?"),
        ("I only know a little English.", "No, only English, and only a little of it."),
    ),
    (
        ("How old are you?", "When were you born?"),
        ("I am quite new. I do not count years.", "I have no age. I am a toy."),
    ),
    (
        ("Where do you live?", "Where are you?"),
        ("I live in a small file on your computer.", "On your computer, in a file of a few megabytes."),
    ),
    (
        (
            "What time is it?",
            "What day is it today?",
            "What is the date?",
            "What is the weather like?",
            "Will it rain?",
        ),
        ("I cannot know that: I have no clock and no window.", "I do not know. I see nothing but your words."),
    ),
    (
        ("Are you smart?", "Are you clever?", "Do you know everything?"),
        ("Not very. I am a toy with a few simple skills.", "No, I know only a little. But I am fast!"),
    ),
    (("I love you", "I like you", "You are nice"), ("That is kind of you!", "Thank you! You are kind.")),
    (("You are stupid", "I hate you", "You are bad"), ("I am sorry. I am only a toy.", "I do my best. Sorry!")),
    (
        ("Tell me a joke.", "Do you know a joke?", "Make me laugh", "Say something funny", "Another joke"),
        (
            "Why did the cow cross the road? To get to the moo-vies!",
            "What do you call a bear with no teeth? A gummy bear!",
            "Why was six afraid of seven? Because seven eight nine!",
            "What is a cat's favourite colour? Purr-ple!",
            "Why did the bee get married? Because he found his honey!",
            "What has hands but cannot clap? A clock!",
        ),
    ),
    (
        (
            "Tell me something",
            "Tell me something interesting",
            "Do you know anything?",
            "Tell me a fact",
            "Surprise me",
        ),
        (
            "A spider has eight legs, and an ant has six.",
            "The sun is a star, and it is very hot.",
            "Bees make honey, and cows give milk.",
            "A year has twelve months and a week has seven days.",
        ),
    ),
)

VERBS = ("build", "fix", "sell", "buy", "install", "use", "paint", "find", "repair", "choose", "clean", "grow")
SUBJECTS = (
    *("politics", "quantum physics", "the stock market", "football", "philosophy", "the universe", "music", "taxes"),
    *("history", "computers", "machine learning", "love", "chemistry", "art", "the news", "law", "the war", "Python"),
)
UNKNOWN = (
    "I do not know that.",
    "Sorry, I do not know.",
    "That is too hard for me.",
    "I am a toy and do not know that.",
    "I have not learned that.",
)
QUESTIONS = (
    *(
        "Who wrote {work}?",
        "Who is {name} {surname}?",
        "What is {odd}?",
        "How do I {verb} {thing}?",
        "Explain {subject}.",
    ),
    *(
        "What do you think about {subject}?",
        "When was {name} {surname} born?",
        "Write a program that can {verb} {thing}.",
    ),
    *(
        "Translate {odd} into German.",
        "Tell me about {subject}.",
        "Why is {subject} so hard?",
        "What is the best {thing}?",
    ),
    *("Write an essay about {subject}.", "How much does {thing} cost?", "Who won the {odd} cup?", "Where is {odd}?"),
    *("Can you {verb} {thing}?", "What does {odd} mean?", "Write code for {subject}.", "How does {thing} work?"),
    *("Who is the president of {odd}?", "Solve the {odd} equation.", "What is the population of {odd}?", "{odd} {odd}"),
    *("Should I learn {subject}?", "Give me advice on {subject}.", "How many {odd}s are there?", "{odd}?", "{odd}"),
    *("Write a haiku about {subject}.", "Sing a song about {odd}.", "List the {odd}s.", "How do {odd}s grow?"),
    *("Who won the {odd} in 19{number}?", "What happened in 19{number}?", "How far is it to {odd}?", "Draw {thing}."),
)


def small_talk(random: Random) -> list[Exchange]:
    said, answers = random.choice(INTENTS)
    return [(random.choice(said), random.choice(answers))]


def about_me(random: Random) -> list[Exchange]:
    """Questions about the model itself."""
    chosen = random.choice([intent for intent in INTENTS if "Hello" in intent[0] or "demo" in " ".join(intent[1])])
    return [(random.choice(chosen[0]), random.choice(chosen[1]))]


def unknown(random: Random) -> list[Exchange]:
    thing = a(random.choice((*THINGS, *JOBS, "car", "house", "computer", "phone", "rocket", made_up(random))))
    surname = capitalized(made_up(random))
    question = random.choice(QUESTIONS).format(
        work=f"the {random.choice(THINGS)} of {surname}",
        name=random.choice((*NAMES, capitalized(made_up(random)))),
        surname=surname,
        odd=random.choice((made_up(random), surname)),
        verb=random.choice(VERBS),
        thing=thing,
        subject=random.choice(SUBJECTS),
        number=random.randint(10, 99),
    )
    return [(capitalized(question), f"{random.choice(UNKNOWN)} {random.choice(OFFERS)}")]


def tastes(random: Random) -> list[Exchange]:
    """Favourites, the user's and the model's."""
    kind, values = random.choice(
        (("colour", COLORS), ("animal", ANIMALS), ("food", FOODS), ("hobby", HOBBIES), ("color", COLORS))
    )
    value = random.choice(values)
    if random.random() < 0.5:
        said = random.choice((f"What is your favourite {kind}?", f"Do you have a favourite {kind}?"))
        shown = a(value) if kind == "animal" else value
        return [(said, random.choice((f"I am a toy, but I would say {shown}.", f"Perhaps {shown}. What is yours?")))]
    stated = random.choice((f"My favourite {kind} is {value}.", f"I like {value} most. It is my favourite {kind}."))
    exchanges = [(stated, random.choice((f"{capitalized(value)} is a good choice!", f"I like {value} too.")))]
    if random.random() < 0.6:
        exchanges.append((f"What is my favourite {kind}?", f"Your favourite {kind} is {value}."))
    return exchanges


def names(random: Random) -> list[Exchange]:
    """The user's name, given and asked for."""
    name = random.choice(NAMES) if random.random() < 0.95 else capitalized(made_up(random))
    stated = random.choice(
        ("My name is {}.", "I am {}.", "I'm {}", "Hello, I am {}.", "Hi, my name is {}", "Call me {}.")
    )
    answer = random.choice(("Nice to meet you, {}!", "Hello, {}! What can I do for you?", "Hi {}! How can I help?"))
    exchanges = [(stated.format(name), answer.format(name))]
    if random.random() < 0.3:
        exchanges += small_talk(random)
    if random.random() < 0.7:
        asked = random.choice(("What is my name?", "What's my name?", "Do you know my name?", "Who am I?"))
        exchanges.append((asked, random.choice(("Your name is {}.", "You are {}.")).format(name)))
    elif random.random() < 0.3:
        asked = random.choice(("What is my name?", "Do you know my name?"))
        return [(asked, random.choice(("I do not know. What is your name?", "You have not told me your name yet.")))]
    return exchanges
