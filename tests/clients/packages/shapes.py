# SPDX-License-Identifier: Apache-2.0
"""Runs the shapes of a package: `python packages/NAME.py BASE_URL MODEL`, with an interpreter that has the package.

A shape is a function of a base URL and a model that asks in one way and returns the text of the answer. Each prints a
line of JSON: its name, and its text or its error. The first line is the package and its version.
"""

import json
import sys
from collections.abc import Callable, Mapping
from importlib import metadata

QUESTION = "What is 7 + 5?"
SCHEMA = {
    "name": "answer",
    "schema": {"type": "object", "properties": {"number": {"type": "integer"}}, "required": ["number"]},
}
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two numbers.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
    },
}

type Shape = Callable[[str, str], str]


def run(package: str, shapes: Mapping[str, Shape]) -> None:
    url, model = sys.argv[1:3]
    print(json.dumps({"package": package, "version": metadata.version(package)}), flush=True)
    for name, shape in shapes.items():
        try:
            line = {"shape": name, "text": shape(url, model)}
        except Exception as error:
            line = {"shape": name, "error": f"{type(error).__name__}: {error}"[:1000]}
        print(json.dumps(line), flush=True)
        sys.stdin.readline()  # until the requests of this shape have been recorded
