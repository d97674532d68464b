"""Plots as inline SVG. Colours and type come from the page's style sheet, by class; text is escaped by ElementTree."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree as ET

from markupsafe import Markup

Points = Sequence[tuple[float, float]]

# A card is shown at about this many pixels on a phone and in a row of three, so type keeps its size.
CARD, WIDE = 360, 640
# Characters of 12 units that fit a card.
LABEL_LENGTH = 46
NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class Plot:
    """A drawing, and the names of its curves where there are several."""

    title: str
    svg: Markup
    legend: tuple[str, ...] = ()


@dataclass(frozen=True)
class Axis:
    """Maps values from low to high onto coordinates from start to end, by difference or by ratio."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        """The coordinate of a value."""
        low, high = self.low, self.high
        if self.logarithmic:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> dict[float, str]:
        """Round values along the axis, with their labels."""
        if self.logarithmic:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for digits in ((1, 2, 5), (1,)):
                found = [digit * 10.0**decade for decade in decades for digit in digits]
                found = [value for value in found if self.low <= value <= self.high]
                if 2 <= len(found) <= 8:
                    return {value: _short(value, value) for value in found}
        # 1, 2 or 5 times a power of ten, so that there are at most five steps
        rough = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * digit for digit in (1, 2, 5, 10) if power * digit >= rough * (1 - 1e-9))
        numbers = range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1)
        return {number * step: _short(number * step, step) for number in numbers}


def _short(value: float, step: float) -> str:
    """A tick's label: as many decimals as the step needs; thousands as k."""
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    text = (
        f"{value / 1000:g}k" if step >= 1000 and value else f"{value:.1e}" if decimals > 4 else f"{value:,.{decimals}f}"
    )
    return text.replace("-", "−")


def linear(values: Iterable[float], start: float, end: float, least: float = 0.0) -> Axis:
    """An axis around values, with room on either side, of at least `least`; below zero only where a value is."""
    values = list(values)
    low, high = min(values), max(values)
    room = max(0.08 * (high - low), (least - (high - low)) / 2) or 0.1 * abs(high) or 1.0
    return Axis(low - room if low < 0 else max(0.0, low - room), high + room, start, end)


def line_chart(title: str, curves: dict[str, Points], least: float = 0.0) -> Plot:
    """Curves over training steps, on an axis that spans `least` at least; a curve of one point is a dot."""
    every = [point for points in curves.values() for point in points]
    steps = sorted({step for step, _ in every})
    x = linear(steps, 46, 350) if len(steps) == 1 else Axis(steps[0], steps[-1], 46, 350)
    y = linear((value for _, value in every), 178, 12, least)
    found = "; ".join(f"{name} from {points[0][1]:.4g} to {points[-1][1]:.4g}" for name, points in curves.items())
    root = _svg(CARD, 214, title, f"Over steps {steps[0]:,.0f} to {steps[-1]:,.0f}: {found}")
    _frame(root, x, y, "step")
    for number, (name, points) in reversed(list(enumerate(curves.items()))):  # the first one on top
        if len(points) == 1:
            mark = _add(root, "circle", cx=x(points[0][0]), cy=y(points[0][1]), r=3.5, class_=f"dot series-{number}")
        else:
            path = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)
            mark = _add(root, "polyline", points=path, class_=f"curve series-{number}")
        _add(mark, "title", name)
    return Plot(title, _markup(root), tuple(curves))


def pareto(title: str, points: Sequence[tuple[float, float, str]], lines: dict[str, float]) -> Plot:
    """Quality over active dims on a log axis: (active dims, nDCG@10, label) per point; systems without dims as lines."""
    points = sorted(point for point in points if point[0] > 0 and math.isfinite(point[0]) and math.isfinite(point[1]))
    lines = {name: value for name, value in lines.items() if math.isfinite(value)}
    if not points:
        return Plot(title, Markup(""))
    x = Axis(points[0][0] / 1.3, points[-1][0] * 1.3, 52, 625, logarithmic=True)
    y = linear([*(point[1] for point in points), *lines.values()], 290, 28)
    found = [f"{label}: nDCG@10 {ndcg:.3f} at {dims:,.0f} active dims" for dims, ndcg, label in points]
    found += [f"{name}: nDCG@10 {value:.3f}" for name, value in lines.items()]
    root = _svg(WIDE, 336, title, "; ".join(found), "wide")
    _frame(root, x, y, "active dims per document (log scale)", "nDCG@10")
    lowest_free = 0.0
    for name, value in sorted(lines.items(), key=lambda item: -item[1]):
        _add(root, "line", x1=x.start, x2=x.end, y1=y(value), y2=y(value), class_="baseline")
        lowest_free = max(y(value) - 5, lowest_free + 20)  # labels of lines that are close move down
        _add(root, "text", f"{_cut(name)} {value:.3f}", x=x.start + 5, y=lowest_free, class_="label halo")
    path = " ".join(f"{x(dims):.1f},{y(ndcg):.1f}" for dims, ndcg, _ in points)
    _add(root, "polyline", points=path, class_="curve series-0")
    placed: list[tuple[float, float]] = []
    for dims, ndcg, label in reversed(points):
        at = x(dims), y(ndcg)
        dot = _add(root, "circle", cx=at[0], cy=at[1], r=5, class_="dot series-0")
        _add(dot, "title", f"{label}: nDCG@10 {ndcg:.3f} at {dims:,.1f} active dims per document")
        if all(abs(at[0] - left) > 34 or abs(at[1] - top) > 15 for left, top in placed):
            _add(root, "text", label, x=at[0], y=at[1] - 11, class_="label halo strong", text_anchor="middle")
            placed.append(at)
    return Plot(title, _markup(root))


def histogram(title: str, edges: Sequence[int], counts: Sequence[int]) -> Plot:
    """Texts by active dims; edges are whole numbers."""
    y = Axis(0, max(5, *counts), 178, 24)
    root = _svg(CARD, 214, title, f"{sum(counts):,} texts with {edges[0]:,} to {edges[-1]:,} active dims")
    _frame(root, None, y, "active dims", "texts")
    width = (350 - 46) / len(counts)
    for number, count in enumerate(counts):
        left, top = 46 + number * width, y(count)
        bar = _add(root, "rect", x=left, y=top, width=max(width - 1, 0.5), height=178 - top, class_="bar main")
        _add(bar, "title", f"{edges[number]:,} to {edges[number + 1]:,}: {count:,} texts")
    every = math.ceil(len(counts) / 5)
    for number in range(0, len(edges), every):
        _add(root, "text", f"{edges[number]:,}", x=46 + number * width, y=193, class_="tick", text_anchor="middle")
    return Plot(title, _markup(root))


def bars(title: str, values: dict[str, float], main: str) -> Plot:
    """A bar from 0 to 1 per system, its name above it, in the accent colour for `main`."""
    x = Axis(0, 1, 0, 310)
    found = ", ".join(f"{name} {value:.3f}" for name, value in values.items())
    root = _svg(CARD, 34 * len(values) + 2, title, f"nDCG@10: {found}")
    for number, (name, value) in enumerate(values.items()):
        top = 34 * number
        kind = "main" if name == main else "other"
        label = _add(root, "text", _cut(name), x=0, y=top + 13, class_="label")
        _add(label, "title", name)
        _add(root, "rect", x=0, y=top + 18, width=x.end, height=8, class_="track")
        _add(root, "rect", x=0, y=top + 18, width=x(value), height=8, class_=f"bar {kind}")
        _add(root, "text", f"{value:.3f}", x=CARD, y=top + 26, class_="label strong", text_anchor="end")
    return Plot(title, _markup(root))


def intervals(title: str, rows: Sequence[tuple[str, float, float | None, float | None]]) -> Plot:
    """(name, difference, low, high) per row: a dot, and a line from low to high where they are known."""
    ends = [value for row in rows for value in row[1:] if value is not None]
    x = linear([0, *ends], 8, CARD - 8, least=0.04)
    bottom = 36 * len(rows) + 2
    found = "; ".join(f"{name} {difference:+.3f}" for name, difference, _, _ in rows)
    root = _svg(CARD, bottom + 20, title, f"Difference in nDCG@10: {found}")
    for value, label in x.ticks().items():
        _add(root, "line", x1=x(value), x2=x(value), y1=0, y2=bottom, class_="zero" if value == 0 else "grid")
        _add(root, "text", label, x=x(value), y=bottom + 15, class_="tick", text_anchor="middle")
    for number, (name, difference, low, high) in enumerate(rows):
        middle = 36 * number + 26
        name_element = _add(root, "text", _cut(name), x=0, y=middle - 11, class_="label halo")
        _add(name_element, "title", name)
        if low is not None and high is not None:
            _add(root, "line", x1=x(low), x2=x(high), y1=middle, y2=middle, class_="interval")
        dot = _add(root, "circle", cx=x(difference), cy=middle, r=4.5, class_="dot series-0")
        _add(dot, "title", f"{name}: {difference:+.3f}")
    return Plot(title, _markup(root))


def _frame(root: ET.Element, x: Axis | None, y: Axis, x_name: str, y_name: str = "") -> None:
    """Grid lines, ticks and the axes' names; the plot lies between the ends of the axes."""
    left, right = (x.start, x.end) if x else (46, 350)
    for value, label in y.ticks().items():
        _add(root, "line", x1=left, x2=right, y1=y(value), y2=y(value), class_="grid")
        _add(root, "text", label, x=left - 6, y=y(value) + 4, class_="tick", text_anchor="end")
    if x is not None:
        for value, label in x.ticks().items():
            _add(root, "line", x1=x(value), x2=x(value), y1=y.start, y2=y.start + 4, class_="grid")
            _add(root, "text", label, x=x(value), y=y.start + 17, class_="tick", text_anchor="middle")
    _add(root, "line", x1=left, x2=right, y1=y.start, y2=y.start, class_="axis")
    height = float(root.get("viewBox", "").split()[-1])
    _add(root, "text", x_name, x=right, y=height - 4, class_="tick", text_anchor="end")
    if y_name:
        _add(root, "text", y_name, x=0, y=y.end - 12 if y.end > 20 else 9, class_="tick")


def _svg(width: int, height: int, title: str, description: str, kind: str = "card") -> ET.Element:
    root = ET.Element("svg", {"class": f"plot {kind}", "viewBox": f"0 0 {width} {height}", "role": "img"})
    _add(root, "title", title)
    _add(root, "desc", description)
    return root


def _add(parent: ET.Element, tag: str, text: str | None = None, **attributes: float | str) -> ET.Element:
    """A child with attributes; `text_anchor` and `class_` stand for text-anchor and class."""
    named = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items()}
    values = {name: value if isinstance(value, str) else f"{value:.1f}" for name, value in named.items()}
    child = ET.SubElement(parent, tag, values)
    child.text = None if text is None else NOT_XML.sub("\N{REPLACEMENT CHARACTER}", text)
    return child


def _cut(name: str) -> str:
    return name if len(name) <= LABEL_LENGTH else name[: LABEL_LENGTH - 1] + "…"


def _markup(root: ET.Element) -> Markup:
    return Markup(ET.tostring(root, encoding="unicode"))
