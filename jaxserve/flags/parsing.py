# SPDX-License-Identifier: Apache-2.0
"""Flags from dataclasses: one for each field, its help the docstring below it. Knows no command and no setting.

    --max-model-len 8k   --max_model_len=8192   --[no-]warmup   --api-key A B   -tp 2

Only what was given is in the result, so that files and defaults can stand behind it. A fault is a UsageError.
"""

import dataclasses
import itertools
import re
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, NoReturn, TypeAliasType, Union, cast, get_args, get_origin, get_type_hints

from jaxserve.errors import UsageError

_SCALES = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_NUMBER = re.compile(r"([+-]?\d[\d_]*(?:\.\d+)?) ?(?:([kmgtKMGT])(i?[bB]?))?", re.ASCII)
_WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
_NEGATIVE = re.compile(r"-[\d.]")


@dataclass(frozen=True)
class Arg:
    """What the type of a field does not say of its flag; in Annotated."""

    positional: bool = False
    metavar: str | None = None
    options: tuple[str, ...] = ()  # further spellings
    unknown: str = ""  # what is said of a word that is none of the choices, {} being that word


class HelpRequested(Exception):
    """--help, or --help=TOPIC."""

    def __init__(self, topic: str | None) -> None:
        self.topic = topic
        super().__init__(topic)


@dataclass(frozen=True, kw_only=True)
class Flag:
    name: str  # the field's
    base: type  # bool, int, float, str or Path
    choices: tuple[str, ...] = ()
    many: bool = False
    optional: bool = False  # None is a value
    default: Any = MISSING
    help: str = ""
    group: str = "options"
    positional: bool = False
    metavar: str = ""
    more: tuple[str, ...] = ()  # further spellings
    secret: bool = False  # its value is not to be shown
    unknown: str = ""  # as Arg's

    @property
    def option(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def options(self) -> tuple[str, ...]:
        return (*(name for name in self.more if name[1] != "-"), self.option, *(n for n in self.more if n[1] == "-"))

    @property
    def negative(self) -> str | None:
        if self.base is not bool:
            return None
        return "--" + self.option[5:] if self.option.startswith("--no-") else "--no-" + self.option[2:]

    @property
    def shown(self) -> str:
        return self.metavar if self.positional else self.option

    def from_text(self, text: str) -> Any:
        """The value that a word on the command line stands for."""
        if self.optional and self.base is not str and text.lower() in ("none", "auto", "null"):
            return None
        if self.choices and text not in self.choices:
            hint = f"choose one of {', '.join(self.choices)}"
            if self.unknown:
                raise UsageError(self.unknown.format(repr(text)), hint)
            self._refuse(text, hint)
        if self.base is bool:
            if text.lower() not in _WORDS:
                self._refuse(text, f"give true or false, or {self.option} alone")
            return _WORDS[text.lower()]
        if self.base is int:
            return self._whole(text)
        if self.base is float:
            try:
                return float(text)
            except ValueError:
                self._refuse(text, "give a number")
        return Path(text) if self.base is Path else text

    def from_data(self, value: Any) -> Any:
        """The same for a value out of a file, which has a type already."""
        if value is None:
            if not self.optional:
                self._refuse(value, "give a value, or leave the line out")
            return None
        if self.many:
            items = cast("list[Any]", value) if isinstance(value, list) else [value]
            return tuple(self._item(item) for item in items)
        return self._item(value)

    def _item(self, value: Any) -> Any:
        wanted = (int, float) if self.base is float else (str,) if self.base is Path else (self.base,)
        if isinstance(value, str):
            return self.from_text(value)
        if not isinstance(value, wanted) or (isinstance(value, bool) and self.base is not bool):
            self._refuse(value, f"give {_article(self.base)}")
        return value

    def _whole(self, text: str) -> int:
        found = _NUMBER.fullmatch(text.strip())
        if found is None:
            self._refuse(text, "give a whole number, such as 4096, 4k (4000) or 4K (4096)")
        digits, letter, unit = found.groups()
        scale = 1
        if letter:
            # 4k and 4K, 8GB and 8GiB: an i says 1024, a unit without one 1000; alone the letter's case decides.
            power = _SCALES[letter.upper() if "i" in unit else letter.lower() if unit else letter]
            scale = power
        value = float(digits) * scale if "." in digits else int(digits) * scale
        if value != int(value):
            self._refuse(text, "give a whole number")
        return int(value)

    def _refuse(self, value: object, hint: str) -> NoReturn:
        raise UsageError(f"{self.shown} is {'not right' if self.secret else repr(value)}", hint)


def _article(base: type) -> str:
    return {bool: "true or false", int: "a whole number", float: "a number"}.get(base, "a text")


# --- from a dataclass -----------------------------------------------------------------------------------------------


def flags_of(
    cls: type,
    *,
    groups: Mapping[str, Iterable[str]] | None = None,
    more: Mapping[str, tuple[str, ...]] | None = None,
    skip: Iterable[str] = (),
) -> list[Flag]:
    """A flag for each field. `groups` says under which heading of the help, `more` has further spellings."""
    hints = get_type_hints(cls, include_extras=True)
    docs = field_docs(cls)
    heading = {name: group for group, names in (groups or {}).items() for name in names}
    found: list[Flag] = []
    for field in dataclasses.fields(cls):
        if field.name in skip:
            continue
        hint, arg = hints[field.name], Arg()
        if get_origin(hint) is Annotated:
            hint, *extras = get_args(hint)
            arg = next((extra for extra in extras if isinstance(extra, Arg)), arg)
        kind = _kind(hint)
        default: Any = field.default
        if field.default_factory is not MISSING:
            default = field.default_factory()
        metavar = arg.metavar or (field.name.upper() if arg.positional else _METAVARS[kind["base"]])
        flag = Flag(
            name=field.name,
            default=default,
            help=docs.get(field.name, ""),
            group=heading.get(field.name, "options"),
            positional=arg.positional,
            metavar=metavar,
            more=(*arg.options, *(more or {}).get(field.name, ())),
            secret=not field.repr,
            unknown=arg.unknown,
            **kind,
        )
        found.append(flag)
    return found


_METAVARS = {int: "N", float: "X", str: "TEXT", Path: "PATH", bool: ""}


def _kind(hint: Any) -> dict[str, Any]:
    """Base type, choices, whether there may be many, whether None."""
    while isinstance(hint, TypeAliasType):
        hint = hint.__value__
    if get_origin(hint) in (UnionType, Union):
        inner = [part for part in get_args(hint) if part is not type(None)]
        return {**_kind(inner[0]), "optional": len(inner) < len(get_args(hint))}
    if get_origin(hint) is tuple:
        return {**_kind(get_args(hint)[0]), "many": True}
    if get_origin(hint) is Literal:
        return {"base": str, "choices": get_args(hint)}
    return {"base": hint}


def field_docs(cls: type) -> dict[str, str]:
    """The docstrings below the fields of a dataclass and those it inherits; none where there is no source."""
    import ast
    import inspect
    import textwrap

    docs: dict[str, str] = {}
    for kind in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(kind):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
        except (OSError, TypeError, SyntaxError):
            continue
        body = cast(ast.ClassDef, tree.body[0]).body
        for field, below in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                match below:
                    case ast.Expr(value=ast.Constant(value=str(text))):
                        docs[field.target.id] = " ".join(text.split())
                    case _:
                        pass
    return docs


# --- the command line -----------------------------------------------------------------------------------------------


class Parser:
    def __init__(
        self, prog: str, flags: Sequence[Flag], *, about: str = "", refused: Mapping[str, tuple[str, str]] | None = None
    ) -> None:
        """`refused` are options that others have and we do not, with a problem and a hint for each."""
        self.prog, self.flags, self.about = prog, tuple(flags), about
        self._refused = dict(refused or {})
        self._places = [flag for flag in flags if flag.positional]
        self._known: dict[str, tuple[Flag, bool]] = {}
        for flag in flags:
            if not flag.positional:
                self._known |= {name: (flag, True) for name in flag.options}
                if flag.negative:
                    self._known[flag.negative] = (flag, False)

    def parse(self, words: Sequence[str]) -> dict[str, Any]:
        """What was given, by name of the field."""
        found: dict[str, Any] = {}
        rest, placed, plain = deque(words), 0, False
        while rest:
            word = rest.popleft()
            if word == "--" and not plain:
                plain = True
            elif not plain and _is_option(word):
                self._option(word, rest, found)
            elif placed < len(self._places):
                flag = self._places[placed]
                if flag.many:
                    found[flag.name] = (*found.get(flag.name, ()), flag.from_text(word))
                else:
                    found[flag.name] = flag.from_text(word)
                    placed += 1
            else:
                places = " ".join(flag.metavar for flag in self._places)
                takes = f"takes {places} alone" if places else "takes options alone"
                raise UsageError(f"{word!r} is one word too many", f"{self.prog} {takes}; see {self.prog} --help")
        for flag in self.flags:
            if flag.default is MISSING and flag.name not in found:
                raise UsageError(f"{flag.shown} is missing", f"see {self.prog} --help")
        return found

    def _option(self, word: str, rest: deque[str], found: dict[str, Any]) -> None:
        name, equals, value = word.partition("=")
        if name in ("-h", "--help"):
            raise HelpRequested(value or None)
        flag, positive = self.look_up(name)
        if flag.base is bool:
            if equals and not positive:
                raise UsageError(f"{name} takes no value", f"give {flag.option}={value}")
            found[flag.name] = flag.from_text(value) if equals else positive
            return
        if not equals and (not rest or _is_option(rest[0])):
            dashed = f", or {name}=VALUE for one that begins with a dash" if rest else ""
            raise UsageError(f"{name} needs a value", f"{name} {value_of(flag)}{dashed}")
        if not flag.many:
            found[flag.name] = flag.from_text(value if equals else rest.popleft())
            return
        items = [value] if equals else []
        while not equals and rest and not _is_option(rest[0]):
            items.append(rest.popleft())
        found[flag.name] = (*found.get(flag.name, ()), *map(flag.from_text, items))

    def look_up(self, name: str) -> tuple[Flag, bool]:
        """The flag that an option names, and whether it says yes; snake_case will do."""
        spelled = "--" + name[2:].replace("_", "-") if name.startswith("--") else name
        if spelled in self._known:
            return self._known[spelled]
        if spelled in self._refused:
            raise UsageError(*self._refused[spelled])
        raise UsageError(f"unknown option {name}", self.did_you_mean(spelled))

    def did_you_mean(self, name: str) -> str:
        from difflib import get_close_matches

        close = get_close_matches(name, [*self._known, "--help"], n=1)
        return f"did you mean {close[0]}?" if close else f"see {self.prog} --help"

    def in_flags_words(self, text: str) -> str:
        """A message about fields, about their flags."""
        for flag in self.flags:
            if "_" in flag.name and not flag.positional:
                # Not within a path or a flag.
                text = re.sub(rf"(?<![\w/.-]){flag.name}(?![\w/-]|\.\w)", flag.option, text)
            else:
                text = re.sub(rf"^{flag.name}(?= is )", flag.shown, text)
        return text


def _is_option(word: str) -> bool:
    return len(word) > 1 and word[0] == "-" and not _NEGATIVE.match(word)


def value_of(flag: Flag) -> str:
    """What stands for its value in usage."""
    return "{" + ",".join(flag.choices) + "}" if flag.choices else flag.metavar + (" ..." if flag.many else "")
