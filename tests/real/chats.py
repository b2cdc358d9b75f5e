# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: RUF001 - letters that look like others are what a tokenizer has to tell apart
"""The real model of the tests: where it is, what it is asked, and what a sensible answer has in it."""

import os
from pathlib import Path

NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
FILE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxserve/real" / NAME
EXPECTED = Path(__file__).with_name("expected.json")

# A question, and words of which an answer has one. The model has 135 million parameters: these are what it knows.
QUESTIONS: dict[str, tuple[str, ...]] = {
    "What is the capital of France?": ("Paris",),
    "What is 2+2?": ("4",),
    "Name three primary colors.": ("Blue", "blue"),
    "Write a one-sentence story about a cat.": ("cat",),
    "Who wrote Romeo and Juliet?": ("Shakespeare",),
    "What is the largest ocean?": ("Pacific",),
    "Say hello in Spanish.": ("Hola", "hola"),
    "List two fruits.": ("apple", "Apple", "banana", "Banana"),
    "What is water made of?": ("hydrogen", "oxygen"),
    "How many days are in a week?": ("7", "seven"),
    "What is the opposite of hot?": ("cold",),
    "Give me a tip for better sleep.": ("sleep",),
    "What is photosynthesis in one sentence?": ("light",),
    "What language is spoken in Brazil?": ("Portuguese",),
    "What do bees make?": ("honey", "hive", "pollin"),
    "What is the boiling point of water in Celsius?": ("100",),
    "Name a famous scientist.": ("Einstein", "Newton", "Curie"),
    "What color is the sky on a clear day?": ("blue",),
    "Which animal barks?": ("dog", "Dog"),
    "Write a short thank you note.": ("thank", "Thank", "Dear"),
}
TEXTS = (
    "Hello, world! It's 2026, isn't it?",
    "  leading, trailing  \n\n\ttabs and 12345.678 numbers",
    "Le café déjà prêt, die Straße, Привет, 你好，世界。 🙂👩‍👩‍👧",
    "def f(x):\n    return {'a': x ** 2}  # comment\r\n",
    "<|im_start|>user\nhi<|im_end|>\n",
    "",
)
PROMPTS = (
    "The three primary colours are",
    "Once upon a time, in a small village",
    "import numpy as np\n\ndef mean(x):",
)
LENGTH = 24  # tokens that follow each prompt
