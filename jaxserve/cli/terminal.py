# SPDX-License-Identifier: Apache-2.0
"""Makes untrusted text safe to print on a terminal, which would interpret its control characters."""

# Control characters (C0, DEL, C1) except newline and tab, and marks that change the text direction.
_CONTROLS = [*range(0x20), *range(0x7F, 0xA0), 0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
_ESCAPES = {code: chr(code).encode("unicode_escape").decode() for code in _CONTROLS if chr(code) not in "\n\t"}


def safe(text: str) -> str:
    """The text with control characters escaped."""
    return text.translate(_ESCAPES)
