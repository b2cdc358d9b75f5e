# SPDX-License-Identifier: Apache-2.0
"""Bars as SVG, readable on light and dark pages, without a library."""

from collections.abc import Mapping
from xml.sax.saxutils import escape

COLOURS = ("#2a78d6", "#d97706", "#0f9d76", "#b4457e", "#7a6ff0")
BAR, GAP, HEIGHT, TOP, LEFT = 34, 40, 220, 46, 16


def bars(groups: Mapping[str, Mapping[str, float]], title: str) -> str:
    """A group of bars for each name; within a group the bars are scaled to its largest, whose value is told."""
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    colours = {name: COLOURS[place % len(COLOURS)] for place, name in enumerate(names)}
    parts: list[str] = []
    x = LEFT
    for label, group in groups.items():
        most = max(group.values(), default=0.0) or 1.0
        for name, value in group.items():
            tall = HEIGHT * value / most
            y = TOP + HEIGHT - tall
            parts.append(f'<rect x="{x}" y="{y:.1f}" width="{BAR}" height="{tall:.1f}" fill="{colours[name]}"/>')
            parts.append(f'<text x="{x + BAR / 2}" y="{y - 4:.1f}" text-anchor="middle">{value:,.0f}</text>')
            x += BAR + 10
        middle = x - (BAR + 10) * len(group) / 2 - 5
        parts.append(f'<text x="{middle}" y="{TOP + HEIGHT + 18}" text-anchor="middle">{escape(label)}</text>')
        x += GAP
    legend_y = TOP + HEIGHT + 42
    at = LEFT
    for name in names:
        parts.append(f'<rect x="{at}" y="{legend_y - 10}" width="12" height="12" fill="{colours[name]}"/>')
        parts.append(f'<text x="{at + 17}" y="{legend_y}">{escape(name)}</text>')
        at += 30 + 8 * len(name)
    width = max(x, at, 8 * len(title) + 2 * LEFT)
    style = "text{font:12px system-ui,sans-serif;fill:#6b7280}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {legend_y + 14}" width="{width}" role="img" '
        f'aria-label="{escape(title)}"><style>{style}</style>'
        f'<text x="{LEFT}" y="20">{escape(title)}</text>{"".join(parts)}</svg>\n'
    )
