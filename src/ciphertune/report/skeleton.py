"""What every page shares: a document that loads nothing, light, dark and on paper, and figures drawn into it.

matplotlib draws figures as SVG without pyplot, so no backend is chosen and no global state is touched. Its colours are
replaced by the page's own variables, so that a figure follows the page into the dark. Jinja escapes every value.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours that are told apart by everybody; their yellow is too pale on white
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
TEXT, FAINT, LINE, PANEL = "#1b1f24", "#57606a", "#d0d7de", "#fffffe"
_VARIABLES = {TEXT: "--text", FAINT: "--faint", LINE: "--line", PANEL: "--panel"} | {
    colour: f"--c{number}" for number, colour in enumerate(COLOURS)
}
_STYLE = {
    "font.size": 10,
    "svg.fonttype": "none",
    "svg.hashsalt": "ciphertune",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "axes.titlesize": 10,
    "grid.color": LINE,
    "legend.frameon": False,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.titlecolor", "legend.labelcolor"), TEXT),
    **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), FAINT),
    "xtick.labelcolor": TEXT,
    "ytick.labelcolor": TEXT,
}


def render(template: str, **values: Any) -> str:
    """The page of a template in `templates/`. Every value is escaped unless the template says it is markup of ours."""
    import jinja2

    loader = jinja2.PackageLoader("ciphertune.report")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template(template).render(**values)


@contextmanager
def drawing() -> Iterator[None]:
    """The style of all figures. A letter that matplotlib's font lacks is no matter: the browser has others."""
    import matplotlib

    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():  # type: ignore[arg-type]  # wants literal keys
        warnings.simplefilter("ignore")
        yield


def figure(height: float) -> tuple[Figure, Axes]:
    """An empty figure, `height` in inches, narrow enough to be read on a phone."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(4.8, height), layout="constrained", facecolor="none")
    return made, made.add_subplot()


def svg(drawn: Figure, key: str, title: str) -> str:
    """A figure as inline SVG: without namespaces, style sheet and metadata, its ids unlike those of other figures.

    key: distinct on the page.
    """
    from xml.etree import ElementTree

    from matplotlib.text import Text

    for text in drawn.findobj(Text):
        assert isinstance(text, Text)
        text.set_parse_math(False)  # a $ in a name is a $
    out = StringIO()
    drawn.savefig(out, format="svg", metadata={"Date": None})
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
    """An attribute with its ids, or references to them, made the figure's own, and its colours the page's."""
    if name == "id":
        return f"{key}-{value}"
    if name == "href":
        return f"#{key}-{value[1:]}" if value.startswith("#") else value
    value = value.replace("url(#", f"url(#{key}-")
    return re.sub("#[0-9a-f]{6}", lambda m: f"var({_VARIABLES[m[0]]})" if m[0] in _VARIABLES else m[0], value)
