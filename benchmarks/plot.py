# SPDX-License-Identifier: Apache-2.0
"""Draws bar charts as SVG text, readable on light and dark pages, without a plotting library."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

COLOURS = ("#2a78d6", "#d97706", "#0f9d76", "#b4457e", "#7a6ff0")
BAR, SPACE, GAP, HEIGHT = 27, 4, 24, 130  # a bar's width, the space after it, the space after a group, the tallest bar
TOP, BOTTOM, MARGIN = 64, 52, 24  # above the tallest bar, below the bars, around a panel
# The chart brings its background: a page may be dark where the browser's preference is light, and the reverse.
STYLE = (
    "text{font:11px system-ui,'Segoe UI',Helvetica,Arial,sans-serif;fill:#57606a}.title{font-weight:600;font-size:13px}"
    ".title,.value{fill:#1f2328}.page{fill:#fff}.axis{stroke:#d0d7de}"
    "@media(prefers-color-scheme:dark){text{fill:#9198a1}.title,.value{fill:#f0f6fc}.page{fill:#0d1117}"
    ".axis{stroke:#3d444d}}"
)


@dataclass(frozen=True)
class Panel:
    """One chart: a group of bars per name. Each group is scaled to its largest bar; values stand above the bars."""

    title: str
    groups: Mapping[str, Mapping[str, float]]
    note: str = ""  # a second line below the title

    @property
    def series(self) -> list[str]:
        return list(dict.fromkeys(name for group in self.groups.values() for name in group))

    @property
    def width(self) -> float:
        bars = sum(len(group) for group in self.groups.values())
        legend = sum(_legend_width(name) for name in self.series)
        charted = bars * (BAR + SPACE) + (len(self.groups) - 1) * GAP
        return max(charted, legend, 7.5 * len(self.title), 6 * len(self.note)) + 2 * MARGIN


def bars(groups: Mapping[str, Mapping[str, float]], title: str) -> str:
    """An SVG with one panel."""
    return figure([Panel(title, groups)], title=title, columns=1)


def figure(panels: Sequence[Panel], *, title: str, footer: Sequence[str] = (), columns: int = 2) -> str:
    """An SVG with the panels side by side, `columns` to a row; `title` is what screen readers say."""
    wide = max(panel.width for panel in panels)
    high = TOP + HEIGHT + BOTTOM
    rows = -(-len(panels) // columns)
    width, height = wide * min(columns, len(panels)), high * rows + 18 * len(footer) + 8 * bool(footer)
    parts = [
        f'<g transform="translate({wide * (place % columns):.0f} {high * (place // columns)})">{_draw(panel)}</g>'
        for place, panel in enumerate(panels)
    ]
    parts += [_text(MARGIN, high * rows + 12 + 18 * line, text) for line, text in enumerate(footer)]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" width="{width:.0f}" role="img" '
        f'aria-label="{escape(title, {chr(34): "&quot;"})}"><style>{STYLE}</style>'
        f'<path class="page" d="M0 0h{width:.0f}v{height}h-{width:.0f}z"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _draw(panel: Panel) -> str:
    colours = {name: COLOURS[place % len(COLOURS)] for place, name in enumerate(panel.series)}
    floor = TOP + HEIGHT
    parts = [_text(MARGIN, 24, panel.title, kind="title"), _text(MARGIN, 41, panel.note)]
    x = float(MARGIN)
    for label, group in panel.groups.items():
        most = max(group.values(), default=0.0) or 1.0
        begin = x
        for name, value in group.items():
            tall = HEIGHT * value / most
            parts.append(
                f'<rect x="{x:.0f}" y="{floor - tall:.1f}" width="{BAR}" height="{tall:.1f}" fill="{colours[name]}"/>'
            )
            parts.append(_text(x + BAR / 2, floor - tall - 4, f"{value:,.0f}", kind="value", middle=True))
            x += BAR + SPACE
        parts.append(f'<path class="axis" d="M{begin - 2:.0f} {floor}H{x - SPACE + 2:.0f}"/>')
        parts.append(_text((begin + x - SPACE) / 2, floor + 16, label, middle=True))
        x += GAP
    x = MARGIN
    for name, colour in colours.items():
        parts.append(f'<rect x="{x:.0f}" y="{floor + 28}" width="10" height="10" fill="{colour}"/>')
        parts.append(_text(x + 15, floor + 37, name))
        x += _legend_width(name)
    return "".join(parts)


def _legend_width(name: str) -> float:
    return 32 + 6.2 * len(name)


def _text(x: float, y: float, text: str, *, kind: str = "", middle: bool = False) -> str:
    if not text:
        return ""
    about = (f' class="{kind}"' if kind else "") + (' text-anchor="middle"' if middle else "")
    return f'<text x="{x:.1f}" y="{y:.1f}"{about}>{escape(text)}</text>'
