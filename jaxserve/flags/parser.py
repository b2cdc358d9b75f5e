# SPDX-License-Identifier: Apache-2.0
"""The command line of a list of flags, parsed by argparse. A fault is a UsageError: one line, with a suggestion.

    --max-model-len 8k   --max_model_len=8192   --[no-]warmup   --api-key A B   -tp 2

Only what was given is in the result, so that configuration files and defaults can fill in the rest.
"""

import json
import re
from argparse import SUPPRESS, ArgumentParser
from collections.abc import Iterator, Sequence
from dataclasses import MISSING
from functools import partial
from itertools import zip_longest
from typing import Any, NoReturn

from jaxserve import unsupported
from jaxserve.errors import UsageError
from jaxserve.flags import values
from jaxserve.flags.setting import Flag

_NEGATIVE = re.compile(r"-[\d.]")  # a number, not an option


class HelpRequested(Exception):
    """--help, or --help=TOPIC."""

    def __init__(self, topic: str | None) -> None:
        self.topic = topic
        super().__init__(topic)


class Parser:
    """The flags of one command. Options of vLLM that jaxserve does not have are refused with a reason."""

    def __init__(self, prog: str, flags: Sequence[Flag], *, about: str = "") -> None:
        self.prog, self.flags, self.about = prog, tuple(flags), about
        self.notes: list[str] = []  # on options of vLLM that were accepted without effect, for the user
        self._words = [flag for flag in flags if flag.is_word]
        self._known: dict[str, tuple[Flag, bool]] = {}
        for flag in flags:
            if flag.is_option:
                self._known |= {name: (flag, True) for name in flag.options}
                if flag.negative:
                    self._known[flag.negative] = (flag, False)

    def parse(self, arguments: Sequence[str]) -> dict[str, Any]:
        """The values given, by name of the field."""
        end = arguments.index("--") if "--" in arguments else len(arguments)
        options = list(self._normalized(list(self._effective(arguments[:end]))))
        namespace, words = _argparser(self.prog, self.flags).parse_known_args(options)
        found: dict[str, Any] = vars(namespace)
        found |= {flag.name: tuple(found[flag.name]) for flag in self.flags if flag.many and flag.name in found}
        self._place([*words, *arguments[end + 1 :]], found)
        for flag in self.flags:
            if flag.own and flag.default is MISSING and flag.name not in found:
                raise UsageError(f"{flag.shown} is missing", f"see {self.prog} --help")
        return found

    def _effective(self, arguments: Sequence[str]) -> Iterator[str]:
        """The arguments without the options of vLLM that ask for what is so anyway."""
        rest = iter([*zip_longest(arguments, arguments[1:])])
        for argument, following in rest:
            name, equals, value = argument.partition("=")
            if not _is_option(argument) or _dashed(name) in self._known or all(flag.own for flag in self.flags):
                yield argument
                continue
            setting, yes = self._setting_of(name)
            alone = equals or yes == "false" or following is None or _is_option(following)
            if not alone and self._accepts(name, setting, str(following)):
                next(rest)
                continue
            if not self._accepts(name, setting, _opposite(value) if equals and yes == "false" else value or yes):
                yield argument

    def _setting_of(self, option: str) -> tuple[str, str]:
        """The setting of vLLM that an option names, and whether the option alone says true or false."""
        option = _dashed(option)
        if option in unsupported.SHORT_FLAGS:
            return unsupported.SHORT_FLAGS[option], "true"
        negative = option.startswith("--no-")
        return option.removeprefix("--no-").removeprefix("--").replace("-", "_"), "false" if negative else "true"

    def accepts_in_file(self, option: str, value: object) -> bool:
        """The same for an entry of a configuration file."""
        setting, yes = self._setting_of(option)
        text = json.dumps(value) if isinstance(value, bool | dict) else str(value)
        known = _dashed(option) in self._known or all(flag.own for flag in self.flags)
        return not known and self._accepts(option, setting, _opposite(text) if yes == "false" else text)

    def _accepts(self, name: str, setting: str, value: str) -> bool:
        """Whether a setting of vLLM is accepted with this value, without effect. Notes it for the user."""
        note = unsupported.no_effect(setting, value.lower())
        if note is not None:
            self.notes.append(f"{name} has no effect: {note}")
        return note is not None

    def _normalized(self, arguments: Sequence[str]) -> Iterator[str]:
        """The arguments as argparse takes them, with dashes for underscores and --no-x for --x=false. What it would
        report less clearly is reported here: unknown options and missing values."""
        for argument, following in zip_longest(arguments, arguments[1:]):
            if not _is_option(argument):
                yield argument
                continue
            name, equals, value = argument.partition("=")
            if name in ("-h", "--help"):
                raise HelpRequested(value or None)
            flag, positive = self.look_up(name)
            if flag.negative is not None and not (positive and flag.choices):
                if equals and not positive:
                    raise UsageError(f"{name} takes no value", f"use {flag.option}={value}")
                yes = values.from_text(flag, value) if equals else positive
                yield flag.option if yes else flag.negative
            elif not equals and flag.setting.yes_no and not values.is_choice(flag, following):
                yield f"{_dashed(name)}={flag.setting.yes_no[0]}"
            elif not equals and (following is None or _is_option(following)):
                dashed = f", or {name}=VALUE if it begins with a dash" if following else ""
                raise UsageError(f"{name} needs a value", f"use {name} {flag.value_form}{dashed}")
            else:
                yield _dashed(name) + equals + value

    def _place(self, words: Sequence[str], found: dict[str, Any]) -> None:
        """Adds the positional arguments."""
        if len(words) > len(self._words):
            takes = " and ".join(flag.metavar for flag in self._words)
            takes = f"one {takes}" if len(self._words) == 1 else takes or "options only"
            problem = f"unexpected argument {words[len(self._words)]!r}"
            raise UsageError(problem, f"{self.prog} takes {takes}; see {self.prog} --help")
        for flag, word in zip(self._words, words, strict=False):
            value = values.from_text(flag, word)
            if found.setdefault(flag.name, value) != value:
                problem = f"{flag.metavar} is given twice: {word} and {flag.option} {found[flag.name]}"
                raise UsageError(problem, "set only one of them")

    def look_up(self, name: str) -> tuple[Flag, bool]:
        """The flag that an option names, and whether it says yes. Underscores may stand for dashes."""
        spelled = _dashed(name)
        if spelled in self._known:
            return self._known[spelled]
        if not all(flag.own for flag in self.flags):
            self._refuse_unsupported(spelled)
        raise UsageError(f"unknown option {name}", self._did_you_mean(spelled))

    def _refuse_unsupported(self, option: str) -> None:
        plain = option.partition(".")[0]  # --compilation-config.mode
        name = self._setting_of(plain)[0]
        if reason := unsupported.SETTINGS.get(name) if option.startswith("--") else None:
            raise UsageError(*reason.about(option))
        short = "-O" if plain.startswith("-O") else plain  # -O3
        if short in unsupported.SHORT_FLAGS:
            name = unsupported.SHORT_FLAGS[short]
            raise UsageError(*unsupported.SETTINGS[name].about(f"{option} (--{name.replace('_', '-')})"))

    def _did_you_mean(self, option: str) -> str:
        from difflib import get_close_matches

        close = get_close_matches(option, [*self._known, "--help"], n=1)
        return f"did you mean {close[0]}?" if close else f"see {self.prog} --help"

    def in_flags_words(self, text: str) -> str:
        """A message about fields, with the names of their flags."""
        for flag in self.flags:
            if "_" in flag.name and flag.is_option:
                # Not within a path or a flag.
                text = re.sub(rf"(?<![\w/.-]){flag.name}(?![\w/-]|\.\w)", flag.option, text)
            else:
                text = re.sub(rf"^{flag.name}(?= is )", flag.shown, text)
        return text


class _Strict(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message, f"see {self.prog} --help")


def _argparser(prog: str, flags: Sequence[Flag]) -> ArgumentParser:
    """Of the options. Positional arguments are what it leaves over: it cannot mix optional ones with options."""
    parser = _Strict(prog, add_help=False, allow_abbrev=False, argument_default=SUPPRESS)
    parser._negative_number_matcher = _NEGATIVE  # pyright: ignore[reportPrivateUsage]
    for flag in flags:
        if not flag.is_option:
            continue
        if flag.negative:
            yes, no = flag.setting.yes_no or (True, False)
            parser.add_argument(flag.negative, dest=flag.name, action="store_const", const=no)
            if flag.base is bool:
                parser.add_argument(*flag.options, dest=flag.name, action="store_const", const=yes)
                continue
        read = partial(values.from_text, flag)
        if flag.many:
            parser.add_argument(*flag.options, dest=flag.name, type=read, nargs="+", action="extend")
        else:
            parser.add_argument(*flag.options, dest=flag.name, type=read)
    return parser


def _dashed(name: str) -> str:
    return "--" + name[2:].replace("_", "-") if name.startswith("--") else name


def _opposite(text: str) -> str:
    return {"true": "false", "false": "true"}.get(text.lower(), text)


def _is_option(word: str) -> bool:
    return len(word) > 1 and word[0] == "-" and not _NEGATIVE.match(word)
