"""The text every Python carries: its documentation, divided by topic among clients, and disjoint text to pretrain on.

Nothing is downloaded and no library module is imported: docstrings and comments are read from the source files.
The text follows the Python version that runs, and is the same on every machine with that version.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import re
import sysconfig
import textwrap
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ciphertune.errors import DataError

PASSAGE_CHARS = 400  # longest passage; about 128 tokens of the shipped tokenizer
DOCUMENT_CHARS = 1600  # longest piece of pretraining text
_MIN_CHARS = 40  # shorter passages carry too little to be worth a training example
_HELDOUT_ONE_IN = 10

# Never read: tools of their own, and what a Python installation may hold beside its library.
_SKIPPED = frozenset(
    [
        "idlelib",
        "site-packages",
        "dist-packages",
        "lib-dynload",
        "__pycache__",
        "ensurepip",
        "pydoc_data",
        "__phello__",
        "this.py",
    ]
)
_TESTS = frozenset(("test", "tests"))  # read for pretraining only, where they are installed


@dataclass(frozen=True)
class Topic:
    """The text of one client: passages of at most `PASSAGE_CHARS` characters to train on, others to evaluate on."""

    name: str
    train: tuple[str, ...]
    heldout: tuple[str, ...]


@dataclass(frozen=True)
class _Leaf:
    """The smallest unit with a name: topics of the language reference, or modules and packages of the library."""

    name: str
    reference: str = ""
    modules: str = ""


# In the order in which clients get them: from the least text to the most. The words are far apart on purpose.
_FAMILIES: dict[str, tuple[_Leaf, ...]] = {
    "numbers": (
        _Leaf("decimal arithmetic", modules="_pydecimal decimal"),
        _Leaf("statistics", modules="statistics random fractions numbers"),
    ),
    "windows and drawing": (
        _Leaf("widgets", modules="tkinter"),
        _Leaf("turtle graphics", modules="turtle turtledemo colorsys"),
    ),
    "mail and the web": (
        _Leaf("mail", modules="email smtplib imaplib poplib mailbox nntplib smtpd mailcap quopri"),
        _Leaf("web", modules="http urllib wsgiref xmlrpc cgi webbrowser html mimetypes"),
        _Leaf("sockets", modules="socket ssl socketserver ftplib telnetlib ipaddress asyncore asynchat netrc"),
    ),
    "language reference": (
        _Leaf(
            "expressions",
            "operator-summary atom-identifiers atom-literals attribute-references await binary bitwise booleans calls "
            "comparisons conversions exprlists floating identifiers imaginary in integers lambda lists dict numbers "
            "power shifting slicings strings subscriptions truth unary yield",
        ),
        _Leaf(
            "statements",
            "assert assignment augassign async break class compound continue debugger del else exceptions execmodel "
            "for function global if import naming nonlocal pass raise return try while with dynamic-features",
        ),
        _Leaf("built-in types", "string-methods formatstrings typesseq typesseq-mutable typesmapping numeric-types"),
        _Leaf("data model", "*"),
    ),
}


def tuning_topics(count: int = 4) -> tuple[Topic, ...]:
    """`count` clients with one topic each, of uneven size. Up to four get a whole family, more share the largest ones.

    Raises ValueError when count < 1, and DataError when this Python carries too little text for so many.
    """
    if count < 1:
        raise ValueError(f"count={count}: want at least one client")
    shares = [share for family in _FAMILIES if (share := _whole(family)).size > 0][:count]
    while len(shares) < count:
        largest = max(shares, key=lambda share: share.size, default=None)
        if largest is None or largest.size < 40:
            raise DataError(
                f"this Python's own documentation is too little text for {count} clients: "
                "ask for fewer, install the full standard library, or use data=jsonl"
            )
        at = shares.index(largest)
        shares[at : at + 1] = largest.halves()
    return tuple(share.topic() for share in shares)


def pretraining_text() -> Iterator[str]:
    """Pieces of at most `DOCUMENT_CHARS` characters: docstrings and comments of all modules outside every topic.

    No paragraph of it occurs in a tuning topic, neither to train on nor held out; none occurs twice.
    """
    taken = {_key(p) for family in _FAMILIES.values() for leaf in family for text in _texts(leaf) for p in _split(text)}
    tuned = tuple(name for family in _FAMILIES.values() for leaf in family for name in leaf.modules.split())
    for path in _sources():
        if any(part.removeprefix("test_").startswith(tuned) for part in path.relative_to(_library()).parts):
            continue
        text = "\n\n".join((*_docstrings(path), *_comments(path)))
        yield from _pack(_unseen(_split(text), taken), DOCUMENT_CHARS)


@dataclass(frozen=True)
class _Share:
    """Leaves of one family, or a part of the passages of a single leaf."""

    family: str
    leaves: tuple[str, ...]
    passages: tuple[tuple[str, ...], ...]  # per leaf
    part: str = ""

    @property
    def size(self) -> int:
        return sum(map(len, self.passages))

    def halves(self) -> tuple[_Share, _Share]:
        """Two uneven shares: between leaves where there are several, within the leaf otherwise."""
        if len(self.leaves) > 1:
            cut = min(range(1, len(self.leaves)), key=lambda i: abs(sum(map(len, self.passages[:i])) - self.size / 2))
            first, second = (self.leaves[:cut], self.passages[:cut]), (self.leaves[cut:], self.passages[cut:])
            return _Share(self.family, *first), _Share(self.family, *second)
        lines, cut = self.passages[0], self.size * 3 // 5
        return (
            _Share(self.family, self.leaves, (lines[:cut],), f"{self.part}a"),
            _Share(self.family, self.leaves, (lines[cut:],), f"{self.part}b"),
        )

    def topic(self) -> Topic:
        """The share with its held-out passages set apart. A passage is held out in every division or in none."""
        whole = {leaf.name for leaf in _FAMILIES[self.family]} == set(self.leaves) and not self.part
        name = self.family if whole else f"{self.family}: {', '.join(self.leaves)}"
        lines = [line for leaf in self.passages for line in leaf]
        train = tuple(line for line in lines if not _is_heldout(line))
        heldout = tuple(line for line in lines if _is_heldout(line))
        return Topic(f"{name} ({self.part})" if self.part else name, train, heldout)


def _whole(family: str) -> _Share:
    """A family with all leaves that this Python has text for."""
    found = {leaf: passages for leaf, passages in _passages()[family].items() if passages}
    return _Share(family, tuple(found), tuple(found.values()))


@cache
def _passages() -> dict[str, dict[str, tuple[str, ...]]]:
    """family -> leaf -> passages. A paragraph belongs to the first text that has it, so all passages are disjoint."""
    taken: set[str] = set()
    found: dict[str, dict[str, tuple[str, ...]]] = {}
    for family, leaves in _FAMILIES.items():
        found[family] = {}
        for leaf in leaves:
            packed = _pack(_unseen((p for text in _texts(leaf) for p in _split(text)), taken), PASSAGE_CHARS)
            found[family][leaf.name] = tuple(line for line in packed if len(line) >= _MIN_CHARS)
    return found


def _is_heldout(passage: str) -> bool:
    return int.from_bytes(hashlib.sha256(passage.encode()).digest()[:4], "big") % _HELDOUT_ONE_IN == 0


def _texts(leaf: _Leaf) -> Iterator[str]:
    """The texts of a leaf, in a fixed order. `reference="*"` takes every topic that no other leaf names."""
    reference = _reference()
    if leaf.reference == "*":
        named = {key for family in _FAMILIES.values() for other in family for key in other.reference.split()}
        yield from (reference[key] for key in sorted(reference) if key not in named)
    else:
        yield from (reference[key] for key in leaf.reference.split() if key in reference)
    wanted = leaf.modules.split()
    for path in _sources() if wanted else ():
        parts = path.relative_to(_library()).parts
        if parts[0].removesuffix(".py") in wanted and _TESTS.isdisjoint(parts):
            yield "\n\n".join(_docstrings(path))


def _reference() -> dict[str, str]:
    """The language reference that `help()` shows, by topic; empty where Python was installed without it."""
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except (ImportError, AttributeError):
        return {}
    return {str(key): str(text) for key, text in topics.items()}


@cache
def _library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


@cache
def _sources() -> tuple[Path, ...]:
    """Every source file of the standard library that is read at all, in a fixed order."""
    root = _library()
    found = [path for path in root.rglob("*.py") if not _is_skipped(path.relative_to(root).parts)]
    return tuple(sorted(found, key=lambda path: path.relative_to(root).as_posix()))


def _is_skipped(parts: tuple[str, ...]) -> bool:
    return parts[0].startswith(("config-", "_sysconfigdata")) or any(part in _SKIPPED for part in parts)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _docstrings(path: Path) -> list[str]:
    """The docstrings of a module, its classes and functions, in the order in which they stand in the file."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of the library's own making, such as an odd escape
            tree = ast.parse(_read(path))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    return [text for node in _definitions(tree) if (text := ast.get_docstring(node))]


def _definitions(node: ast.AST) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """A module and everything defined in it; expressions, which define nothing, are not searched."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):
            yield from _definitions(child)


def _comments(path: Path) -> list[str]:
    """Blocks of comment lines, without their marks."""
    blocks = re.findall(r"(?:^[ \t]*#(?![!]).*\n)+", _read(path), flags=re.MULTILINE)
    return [re.sub(r"^[ \t]*#+ ?", "", block, flags=re.MULTILINE).strip() for block in blocks]


def _split(text: str) -> list[str]:
    """Paragraphs, none longer than a passage."""
    paragraphs: list[str] = []
    for paragraph in re.split(r"\n\s*\n", textwrap.dedent(text.expandtabs())):
        lines = [line.rstrip()[:PASSAGE_CHARS] for line in paragraph.splitlines() if line.strip()]
        paragraphs += _pack(lines, PASSAGE_CHARS, "\n")
    return paragraphs


def _unseen(paragraphs: Iterable[str], taken: set[str]) -> Iterator[str]:
    """The paragraphs not met before; their keys are added to `taken`."""
    for paragraph in paragraphs:
        key = _key(paragraph)
        if key and key not in taken:
            taken.add(key)
            yield paragraph


def _key(paragraph: str) -> str:
    """What two paragraphs have in common when they differ in spacing, quotes and case only."""
    return re.sub(r"\W+", " ", paragraph).strip().lower()


def _pack(pieces: Iterable[str], limit: int, glue: str = "\n\n") -> Iterator[str]:
    """Neighbouring pieces joined to texts of at most `limit` characters."""
    held = ""
    for piece in pieces:
        joined = f"{held}{glue}{piece}" if held else piece
        if held and len(joined) > limit:
            yield held
            held = piece
        else:
            held = joined
    if held:
        yield held
