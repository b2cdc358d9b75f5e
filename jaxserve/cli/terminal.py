# SPDX-License-Identifier: Apache-2.0
"""Text that others wrote, on a terminal that obeys what it is shown."""

# Besides line ends and tabs: controls (C0, DEL, C1), and marks that turn the direction of what follows.
_CONTROLS = [*range(0x20), *range(0x7F, 0xA0), 0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
_ESCAPES = {code: chr(code).encode("unicode_escape").decode() for code in _CONTROLS if chr(code) not in "\n\t"}


def safe(text: str) -> str:
    """The same with control characters written out."""
    return text.translate(_ESCAPES)
