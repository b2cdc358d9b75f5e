# SPDX-License-Identifier: Apache-2.0
"""Configuration files: YAML whose keys are flags without their leading dashes."""

from pathlib import Path
from typing import Any, cast

from jaxserve.errors import UsageError
from jaxserve.flags import values
from jaxserve.flags.parser import Parser

_FORM = "write one `flag: value` per line"


def read(path: Path, parser: Parser) -> dict[str, Any]:
    """The settings in a file, by name of the field."""
    found: dict[str, Any] = {}
    for key, value in _content(path).items():
        try:
            option = "--" + str(key).strip().lstrip("-")
            if parser.accepts_in_file(option, value):
                continue
            flag, positive = parser.look_up(option)
            if flag.name == "config":
                raise UsageError(f"{key} names another configuration file", "remove it")
            if flag.name in found:
                raise UsageError(f"{key} is given twice", "remove one of them")
            found[flag.name] = values.from_data(flag, value) if positive else values.opposite(flag, value)
        except UsageError as error:
            problem = error.problem.replace("unknown option --", "unknown setting ")
            raise UsageError(f"{path}: {problem}", error.hint.replace("did you mean --", "did you mean ")) from None
    return found


def _content(path: Path) -> dict[object, object]:
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses a key that is given twice."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Any:
            for place, (key, _) in enumerate(node.value):
                if any(key.value == other.value for other, _ in node.value[:place]):
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
            return super().construct_mapping(node, deep)

    try:
        content: object = yaml.load(path.expanduser().read_text(encoding="utf-8"), Loader)
    except OSError as error:
        raise UsageError(f"cannot read the configuration file {path}: {error.strerror}", "check --config") from None
    except (yaml.YAMLError, ValueError, LookupError, TypeError, RecursionError) as error:
        where = " ".join(str(error).split()).replace(' in "<unicode string>", line', " at line")
        raise UsageError(f"{path} is not valid YAML: {where}", _FORM) from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UsageError(f"{path} contains no settings", _FORM)
    return cast("dict[object, object]", content)
