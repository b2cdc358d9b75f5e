# SPDX-License-Identifier: Apache-2.0
"""A GGUF file's key-value pairs with their types checked, under the names that they have in its architecture."""

from typing import Any, NoReturn, cast

from convert.files.header import TensorInfo, quote
from convert.files.reader import read_bytes
from convert.gguf import blocks
from convert.gguf.header import GgufHeader, fail
from jaxserve.errors import one_line

MAX_FACTORS = 1 << 16  # of a rotary embedding


class Fields:
    def __init__(self, header: GgufHeader) -> None:
        self.header = header
        self.architecture = self.text("general.architecture")

    def value(self, key: str) -> Any:
        """The value of a key of the architecture; None if it is missing. A list with equal items, one for each layer,
        is one of them."""
        full = f"{self.architecture}.{key}"
        value = self.header.pairs.get(full)
        if isinstance(value, list):
            if not value or any(each != value[0] for each in value):
                self.fail(f"{quote(full)} differs between layers, which is not supported", "use another model")
            value = value[0]
        return value

    def count(self, key: str, default: int | None = None) -> int:
        value = self.value(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**31:
            self._wrong(f"{self.architecture}.{key}", value, "a number from 0 to 2^31-1")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        value = self.value(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool):
            self._wrong(f"{self.architecture}.{key}", value, "a number")
        return float(value)

    def text(self, key: str, default: str | None = None) -> str:
        """The value of a key with its full name."""
        value = self.header.pairs.get(key, default)
        if not isinstance(value, str):
            self._wrong(key, value, "a text")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """The value of a key with its full name."""
        value = self.header.pairs.get(key, default)
        if not isinstance(value, bool):
            self._wrong(key, value, "true or false")
        return value

    def items[Item](self, key: str, kind: type[Item]) -> list[Item] | None:
        """The list under a key with its full name; None if the file lacks it."""
        value = self.header.pairs.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or not all(type(each) is kind for each in value):
            self._wrong(key, value, f"a list of {kind.__name__}")
        return cast("list[Item]", value)

    def tensor(self, name: str) -> TensorInfo | None:
        return self.header.tensors.get(name)

    def factors(self, name: str) -> list[float] | None:
        """The values of a small tensor; None if the file lacks it."""
        info = self.tensor(name)
        if info is None:
            return None
        if len(info.shape) != 1 or info.shape[0] > MAX_FACTORS or info.dtype != "F32":
            self.fail(f"tensor {quote(name)} is {info.dtype} of shape {list(info.shape)}, expected a list of F32")
        return blocks.values("F32", read_bytes(info)[None])[0].tolist()

    def fail(self, problem: str, hint: str = "download the file again") -> NoReturn:
        fail(self.header.file, problem, hint)

    def _wrong(self, key: str, value: object, expected: str) -> NoReturn:
        shown = "no value" if value is None else one_line(repr(value), limit=100)
        self.fail(f"{quote(key)} has {shown}, expected {expected}")
