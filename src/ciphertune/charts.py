"""A comparison for people: its table as Markdown, and with charts as one HTML page that needs no network.

matplotlib draws the charts as SVG without pyplot, so no backend is chosen and no global state is touched.
"""

from __future__ import annotations

import re
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from html import escape
from io import StringIO
from typing import TYPE_CHECKING, Any

from ciphertune.comparison import SHARES, deviation, metric_names, table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours that are told apart by everybody; their yellow is too pale on white
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")  # 8 markers and 7 colours: 56 rows differ
_LINES = ("-", "--", "-.", ":")
_HATCHES = ("", "///", "\\\\\\", "xxx", "---", "|||", "+++", "//")  # lines: circles would make a page of megabytes
_STAGES = ("load", "unseal", "evaluate", "score", "train", "seal", "aggregate", "save")
_STYLE = {"font.size": 10, "svg.fonttype": "none", "axes.spines.top": False, "axes.spines.right": False}
_CSS = """
:root{color-scheme:light dark;--back:#fff;--text:#1b1f24;--faint:#57606a;--line:#d0d7de;--head:#f3f5f7}
@media(prefers-color-scheme:dark){:root{--back:#14181d;--text:#e6e9ed;--faint:#a0a9b4;--line:#3a424c;--head:#1e242b}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:72rem;padding:1rem;background:var(--back);color:var(--text);
font:16px/1.5 system-ui,sans-serif}
h1,p,dd,li,th,td,figcaption{overflow-wrap:anywhere}
.wide{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:.9rem}
th,td{padding:.4rem .6rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th:first-child{text-align:left;white-space:normal;min-width:8rem;font-weight:600}
thead th{background:var(--head)}
p,footer{color:var(--faint);font-size:.9rem;max-width:60rem}
code{font-size:.85rem}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr));gap:1rem;align-items:start}
figure{margin:0;padding:.75rem;background:#fff;color:#1b1f24;border:1px solid var(--line);border-radius:.5rem;
break-inside:avoid}
figcaption{font-weight:600}
figure svg{display:block;width:100%;height:auto}
figure svg *{stroke-linejoin:round;stroke-linecap:butt}
@media print{:root{--back:#fff;--text:#000;--faint:#333;--line:#bbb;--head:#eee}body{max-width:none;padding:0;
font-size:11px}th,td{white-space:normal;padding:.2rem .3rem}.charts{grid-template-columns:1fr 1fr}
tr{break-inside:avoid}}
"""


def page(found: Mapping[str, Any]) -> str:
    """The results as one HTML page. Everything from the user is escaped; the page may load nothing."""
    name, about = escape(found["about"]["name"]), found["about"]
    figures = [f"<figure><figcaption>{escape(t)}</figcaption>{svg}</figure>" for t, svg in charts(found)]
    own = [f"<li>{escape(n)}: <code>{escape(' '.join(r['overrides']))}</code></li>" for n, r in found["rows"].items()]
    common = escape(" ".join(about["overrides"])) or "none"
    made = escape(", ".join(f"{k} {v}" for k, v in about["versions"].items()))
    sections = [
        f"<h1>{name}</h1>",
        _table(*table(found)),
        *(f"<p>{escape(note)}</p>" for note in notes(found)),
        f'<div class="charts">{"".join(figures)}</div>',
        "<p>Curves: plain mean over the clients of what each measured before a round, line: mean over seeds, band: "
        "standard deviation. MB: up and down of the rounds before. Stages: summed over the clients and the server.</p>",
        f"<footer><p>Overrides of all rows: <code>{common}</code>. Of each row:</p><ul>{''.join(own)}</ul>"
        f"<p>{made}</p></footer>",
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        f"<title>{name}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n"
        + "\n".join(sections)
        + "\n</body>\n</html>\n"
    )


def markdown(found: Mapping[str, Any]) -> str:
    """The table, how to read it, and what was asked for."""
    header, lines = table(found)
    rule = ["---", *["---:"] * (len(header) - 1)]
    text = "\n".join(f"| {' | '.join(map(_escaped, line))} |" for line in (header, rule, *lines))
    own = "\n".join(f"- {_escaped(n)}: {_escaped(' '.join(r['overrides']))}" for n, r in found["rows"].items())
    about = found["about"]
    common = f"Overrides of all rows: {_escaped(' '.join(about['overrides'])) or 'none'}. Of each row:\n\n{own}"
    return "\n\n".join([f"# {_escaped(about['name'])}", text, *notes(found), common]) + "\n"


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is: row names come from the user."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", text)


def notes(found: Mapping[str, Any]) -> list[str]:
    """How to read the table, in sentences."""
    about = found["about"]
    seeds, done = about["seeds"], f"{about['completed']} of {about['runs']} runs are finished."
    spread = "Mean ± sample standard deviation over seeds" if len(seeds) > 1 else "One seed, so no deviation; seed"
    return [
        f"{spread} {', '.join(map(str, seeds))}. Under one seed all rows have the same division of the data and the "
        f"same first adapter, unless a row's own overrides say otherwise. {done}",
        "Bytes are those of one client in one round. Seconds are those of the rounds on this machine, without start, "
        "last evaluation and training alone; they compare methods only when nothing else ran beside them.",
    ]


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in header)
    rows = [
        f'<tr><th scope="row">{escape(line[0])}</th>{"".join(f"<td>{escape(x)}</td>" for x in line[1:])}</tr>'
        for line in lines
    ]
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def charts(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Title and inline SVG of each chart; none while no run is finished."""
    import matplotlib

    rows = {name: row for name, row in found["rows"].items() if row["seeds"]}
    if not rows:
        return []
    metric = next(iter(metric_names(found)), "loss")
    label = f"held-out {metric}" + (" (%)" if metric in SHARES else "")
    # a row keeps its colour and marker while others are still to come
    place = {name: index for index, name in enumerate(found["rows"])}
    with matplotlib.rc_context(_STYLE):  # type: ignore[arg-type]  # its stub wants literal keys
        drawn = [
            (f"{label} against round", _curves(rows, place, metric, label, by_bytes=False)),
            (f"{label} against MB per client", _curves(rows, place, metric, label, by_bytes=True)),
            ("seconds by stage", _stage_bars(rows)),
            ("values that travelled encrypted", _encrypted_bars(rows)),
        ]
        return [(title, _svg(figure, f"c{number}", title)) for number, (title, figure) in enumerate(drawn)]


def _course(row: Mapping[str, Any], metric: str) -> list[tuple[int, float, float, float]]:
    """Round, MB per client, mean and deviation of the metric: the rounds before which every seed measured it."""
    points, scale = [], 100.0 if metric in SHARES else 1.0
    for same in zip(*(run["rounds"] for run in row["seeds"].values()), strict=False):
        measured = [x["loss"] if metric == "loss" else (x["metric"] or {}).get(metric) for x in same]
        values = [value for value in measured if value is not None]
        if len(values) == len(measured):
            spread = scale * (deviation(values) or 0.0)
            bytes_ = statistics.fmean(x["bytes_so_far"] for x in same)
            points.append((same[0]["round"], bytes_ / 1e6, scale * statistics.fmean(values), spread))
    return points


def _curves(rows: Mapping[str, Any], place: Mapping[str, int], metric: str, label: str, *, by_bytes: bool) -> Figure:
    """A line per row, with a marker where it was measured and a band of one deviation."""
    from matplotlib.ticker import MaxNLocator

    # a legend entry may not begin with an underscore, so the names are given one by one and made harmless
    names = ["\u200b" + textwrap.shorten(name, 44, placeholder="…") for name in rows]
    figure, axes = _figure(3.3 + 0.2 * -(-len(rows) // (1 if max(map(len, names)) > 18 else 3)))
    lines = []
    for name, row in rows.items():
        index, points = place[name], _course(row, metric)
        x = [p[1] if by_bytes else p[0] for p in points]
        low, high = [p[2] - p[3] for p in points], [p[2] + p[3] for p in points]
        colour = _COLOURS[index % len(_COLOURS)]
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        style: dict[str, Any] = {"marker": _MARKERS[index % len(_MARKERS)], "linestyle": _LINES[index % len(_LINES)]}
        lines += axes.plot(x, [p[2] for p in points], color=colour, markersize=5, linewidth=1.6, **style)
    if not by_bytes:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("MB per client, up and down" if by_bytes else "rounds done")
    axes.set_ylabel(label)
    axes.grid(alpha=0.25)
    figure.legend(lines, names, loc="outside lower center", ncols=1 if max(map(len, names)) > 18 else 3, frameon=False)
    return figure


def _stage_bars(rows: Mapping[str, Any]) -> Figure:
    """A bar per row: the mean over seeds of the seconds spent in each stage."""
    figure, axes = _bars(rows, extra=0.9)
    found = {stage for row in rows.values() for run in row["seeds"].values() for stage in run["seconds_by_stage"]}
    stages = [s for s in _STAGES if s in found] + sorted(found - set(_STAGES))
    left = [0.0] * len(rows)
    for index, stage in enumerate(stages):
        runs = [row["seeds"].values() for row in rows.values()]
        values = [statistics.fmean(run["seconds_by_stage"].get(stage, 0.0) for run in one) for one in runs]
        style: dict[str, Any] = {"hatch": _HATCHES[index % len(_HATCHES)], "edgecolor": "white", "linewidth": 0}
        colour = _COLOURS[index % len(_COLOURS)]
        axes.barh(range(len(rows)), values, left=left, height=0.65, color=colour, label=stage, **style)
        left = [a + b for a, b in zip(left, values, strict=True)]
    axes.set_xlabel("seconds, clients and server together")
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    return figure


def _encrypted_bars(rows: Mapping[str, Any]) -> Figure:
    """A bar per row, with its figure beside it."""
    figure, axes = _bars(rows)
    values = [100 * row["mean"]["encrypted_fraction"] for row in rows.values()]
    axes.barh(range(len(rows)), values, height=0.65, color=_COLOURS[0])
    for index, value in enumerate(values):
        axes.text(value + 1, index, f"{value:.3g}%", va="center")
    axes.set_xlim(0, 115)
    axes.set_xticks(range(0, 101, 25))
    axes.set_xlabel("% of the values")
    return figure


def _bars(rows: Mapping[str, Any], extra: float = 0.0) -> tuple[Figure, Axes]:
    names = ["\n".join(textwrap.wrap(textwrap.shorten(name, 44, placeholder="…"), 18)) for name in rows]
    figure, axes = _figure(1.0 + extra + 0.45 * len(rows))
    axes.set_yticks(range(len(rows)), names)
    axes.invert_yaxis()  # the first row on top
    return figure, axes


def _figure(height: float) -> tuple[Figure, Axes]:
    """Narrow enough to be read on a phone."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8, height), layout="constrained", facecolor="white")
    return figure, figure.add_subplot()


def _svg(figure: Figure, key: str, title: str) -> str:
    """A figure as inline SVG: without namespaces, style sheet and metadata, its ids unlike those of other charts."""
    from xml.etree import ElementTree

    from matplotlib.text import Text

    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        text.set_parse_math(False)  # a $ in a row's name is a $
    out = StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    root = ElementTree.fromstring(out.getvalue())  # noqa: S314  # matplotlib wrote it a moment ago
    for parent in root.iter():
        for child in [c for c in parent if str(c.tag).endswith(("}metadata", "}style"))]:
            parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        plain = {name.rpartition("}")[2]: value for name, value in element.attrib.items()}
        element.attrib.clear()
        element.attrib.update({name: _own(name, value, key) for name, value in plain.items()})
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.attrib |= {"role": "img", "aria-label": title}
    return ElementTree.tostring(root, encoding="unicode")


def _own(name: str, value: str, key: str) -> str:
    """An attribute with its ids, or references to them, made the chart's own."""
    if name == "id":
        return f"{key}-{value}"
    if name == "href" and value.startswith("#"):
        return f"#{key}-{value[1:]}"
    return value.replace("url(#", f"url(#{key}-")
