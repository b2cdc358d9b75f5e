# SPDX-License-Identifier: Apache-2.0
"""Setting: a flag declared beside its field. Flag: a field of a dataclass together with its Setting.

    port: Annotated[int, Setting("Port to listen on.", "Server", low=0, high=65535)] = 8000

Everything about a flag follows from this line: option, value check, help, configuration key, completion, docs.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from dataclasses import KW_ONLY, MISSING, dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeAliasType, Union, cast, get_args, get_origin, get_type_hints

from jaxserve.flags.sizes import given_size


@dataclass(frozen=True)
class Setting:
    """What the type and the default of a field do not say about its flag."""

    help: str
    group: str = "Options"  # heading in help and docs
    _: KW_ONLY
    common: bool = False  # part of the short --help of a command with many flags
    spellings: tuple[str, ...] = ()  # further options, such as -tp
    given_as: Literal["option", "word", "either"] = "option"  # a word is a positional argument
    metavar: str = ""
    unit: Literal["", "bytes", "tokens", "seconds"] = ""
    low: float | None = None
    above: float | None = None  # a lower bound that is not allowed itself
    high: float | None = None  # for a float, inf allows infinity
    below: float | None = None  # an upper bound that is not allowed itself
    power_of_two: bool = False
    empty: bool = False  # the empty string is a value
    yes_no: tuple[str, str] | None = None  # the choices that true and false (--no-NAME) stand for
    unknown_choice: str = ""  # what to say of a value that is not a choice; {} is the value


@dataclass(frozen=True, kw_only=True)
class Flag:
    """A field of a dataclass as a flag."""

    name: str
    setting: Setting
    base: type  # bool, int, float, str or Path
    choices: tuple[str, ...] = ()
    many: bool = False
    optional: bool = False  # None is a value
    default: Any = MISSING
    secret: bool = False  # its value must not be shown
    own: bool = True  # of the command itself, not of a configuration within it

    @property
    def help(self) -> str:
        return self.setting.help

    @property
    def group(self) -> str:
        return self.setting.group

    @property
    def is_word(self) -> bool:
        """Whether it can be given as a positional argument."""
        return self.setting.given_as != "option"

    @property
    def is_option(self) -> bool:
        return self.setting.given_as != "word"

    @property
    def option(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def options(self) -> tuple[str, ...]:
        """All spellings, short ones first."""
        more = self.setting.spellings
        return (*(name for name in more if name[1] != "-"), self.option, *(name for name in more if name[1] == "-"))

    @property
    def negative(self) -> str | None:
        """The option that says no."""
        if self.base is not bool and self.setting.yes_no is None:
            return None
        return "--" + self.option[5:] if self.option.startswith("--no-") else "--no-" + self.option[2:]

    @property
    def metavar(self) -> str:
        units = {"bytes": "SIZE", "seconds": "SECONDS"}
        usual = units.get(self.setting.unit) or _METAVARS[self.base]
        return self.setting.metavar or (self.name.upper() if self.is_word else usual)

    @property
    def shown_default(self) -> str | None:
        """The default as users would give it; None where there is nothing to show."""
        value = self.default
        if value is MISSING or value is None or value is False or value in ((), ""):
            return None
        if self.setting.unit == "bytes":
            return given_size(value)
        if isinstance(value, tuple):
            return " ".join(map(str, cast("tuple[object, ...]", value)))
        return "on" if value is True else f"{value:g}" if isinstance(value, float) else str(value)

    @property
    def value_form(self) -> str:
        """What stands for the value in usage."""
        return "{" + ",".join(self.choices) + "}" if self.choices else self.metavar + (" ..." if self.many else "")

    @property
    def shown(self) -> str:
        """What an error of the command line calls it."""
        return self.option if self.is_option else self.metavar


_METAVARS = {int: "N", float: "X", str: "TEXT", Path: "PATH", bool: ""}


@functools.cache
def flags_of(kind: type, *, own: bool = True) -> tuple[Flag, ...]:
    """The flags of a dataclass: its fields that have a Setting, then those of the configurations that it holds."""
    hints = get_type_hints(kind, include_extras=True)
    found: list[Flag] = []
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        if get_origin(hint) is not Annotated:
            continue
        hint, *extras = get_args(hint)
        for setting in extras:
            if isinstance(setting, Setting):
                default: Any = field.default
                if field.default_factory is not MISSING:
                    default = field.default_factory()
                secret = not field.repr
                found.append(
                    Flag(name=field.name, setting=setting, default=default, secret=secret, own=own, **_kind(hint))
                )
    for _, inner in configurations(kind):
        found += flags_of(inner, own=False)
    return tuple(found)


def configurations(kind: type) -> Iterator[tuple[str, type]]:
    """The fields whose values are dataclasses, by name; optional ones too."""
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        parts = get_args(hint) if get_origin(hint) in (UnionType, Union) else (hint,)
        for part in parts:
            if dataclasses.is_dataclass(part):
                yield field.name, cast(type, part)


def build[T](kind: type[T], given: Mapping[str, Any]) -> T:
    """An object of this dataclass, and of the configurations that it holds, from values by name of the field."""
    inner = dict(configurations(kind))
    own = [field.name for field in dataclasses.fields(cast(Any, kind))]
    values = {name: given[name] for name in own if name in given and name not in inner}
    return kind(**values, **{name: build(each, given) for name, each in inner.items()})


def _kind(hint: Any) -> dict[str, Any]:
    """What a type says of a flag."""
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
