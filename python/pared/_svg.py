"""Pages in HTML with plots in SVG: one file, light and dark, no scripts, nothing to fetch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

__all__ = [
    "CHARACTER",
    "COLOURS",
    "document",
    "fit",
    "legend",
    "line",
    "log_ticks",
    "plain",
    "rect",
    "svg",
    "text",
    "ticks",
]

# Told apart with every kind of colour vision; grey is for what the others are compared with.
COLOURS = ("#7a869a", "#2f7bd9", "#d9730d", "#1f9e77", "#b8479a", "#8067d6", "#a37b00")
# Of the page's font at 12 px: the mean width of a character, for what has to fit.
CHARACTER = 6.3

_STYLE = """
:root { color-scheme: light dark; --page: #f7f8fa; --card: #ffffff; --ink: #1c2430; --soft: #5d6879;
  --line: #dfe3e9; --grid: #eceff3; }
@media (prefers-color-scheme: dark) { :root { --page: #11151b; --card: #191f28; --ink: #e7ebf1;
  --soft: #9aa6b7; --line: #333c49; --grid: #252d38; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1060px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 4px; }
h2 { font-size: 18px; margin: 0 0 4px; }
h3 { font-size: 14px; margin: 0 0 6px; overflow-wrap: anywhere; }
p { margin: 0 0 12px; color: var(--soft); }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 20px; margin-top: 20px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 14px;
  margin-top: 20px; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 18px; }
.tile b { display: block; font-size: 27px; line-height: 1.25; font-weight: 650; }
.tile span { color: var(--soft); font-size: 13px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 5px 12px; vertical-align: top; white-space: nowrap;
  border-bottom: 1px solid var(--grid); }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
thead th { border-bottom: 1px solid var(--line); font-weight: 600; }
td small { color: var(--soft); display: block; font-size: 12px; line-height: 1.2; }
tr.rule td { border-bottom: 1px solid var(--line); }
.dot { display: inline-block; width: 10px; height: 10px; border-radius: 50%; margin-right: 7px; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: 13px; margin: 0 0 8px; }
svg { display: block; width: 100%; height: auto; font-family: inherit; }
svg text { font-size: 12px; fill: var(--ink); }
svg text.soft { fill: var(--soft); }
svg text.small { font-size: 11px; }
svg .grid { stroke: var(--grid); }
svg .axis { stroke: var(--line); }
svg .lead { stroke: var(--soft); stroke-width: 0.8; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(430px, 1fr)); gap: 24px 36px; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 16px; }
@media (max-width: 520px) { .panels { grid-template-columns: 1fr; } }
footer { color: var(--soft); font-size: 13px; margin-top: 24px; }
"""


def document(title: str, lead: str, body: str, footer: str) -> str:
    """The whole page as text; `body` is HTML, the rest plain text."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body><main>"
        f"<h1>{escape(title)}</h1><p>{escape(lead)}</p>"
        f"{body}<footer>{escape(footer)}</footer></main></body></html>\n"
    )


def legend(items: Sequence[tuple[str, str]]) -> str:
    """Dots of (colour, name)."""
    dots = "".join(
        f'<span><i class="dot" style="background:{colour}"></i>{escape(name)}</span>'
        for colour, name in items
    )
    return f'<div class="legend">{dots}</div>'


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers in [low, high]."""
    span = (high - low) or 1.0
    step = 10.0 ** math.floor(math.log10(span / about))
    step *= next(f for f in (1, 2, 5, 10) if span / (step * f) <= about + 0.5)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten in [low, high]."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [f * 10.0**p for p in powers for f in (1, 2, 5) if low * 0.999 <= f * 10.0**p <= high * 1.001]


def plain(x: float) -> str:
    return f"{x:.6f}".rstrip("0").rstrip(".") if abs(x) < 1e5 else f"{x:.3g}"


def text(x: float, y: float, content: str, anchor: str = "start", kind: str = "", tip: str = "") -> str:
    title = f"<title>{escape(tip)}</title>" if tip else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escape(content)}{title}</text>'
    )


def line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" {style}/>'


def rect(x: float, y: float, width: float, height: float, style: str, tip: str = "") -> str:
    title = f"<title>{escape(tip)}</title>" if tip else ""
    place = f'x="{x:.1f}" y="{y:.1f}" width="{max(0.0, width):.1f}" height="{height:.1f}"'
    return f"<rect {place} {style}>{title}</rect>"


def svg(width: float, height: float, parts: Sequence[str], label: str) -> str:
    body = "\n".join(parts)
    return f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(label)}">{body}</svg>'


def fit(name: str, width: float) -> str:
    """The end of a name, which tells layers apart, where all of it has no room."""
    room = int(width / CHARACTER)
    return name if len(name) <= room else "…" + name[-(room - 1) :]
