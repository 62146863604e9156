"""Pages as a reader sees them, and run folders that are made up."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import yaml

HOSTILE = "<script>alert('x')</script>\"&$y^{$\u202e"


class Page(HTMLParser):
    """The tags, attributes and text of a page; every tag must be closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.code = ""  # what is preformatted
        self.feed(text)
        self.close()
        assert self.open == []

    @property
    def text(self) -> str:
        """All of it in one line."""
        return " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.texts.append(data)
        if "pre" in self.open:
            self.code += data


def check_harmless(text: str) -> Page:
    """A page that loads nothing and runs nothing, whatever is in it."""
    page = Page(text)
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'; img-src data:") in page.attributes
    assert not {"script", "img", "link", "iframe", "object", "embed", "form", "a", "base"} & set(page.tags)
    assert not [k for k, _ in page.attributes if k.startswith("on")]
    loaded = [v for k, v in page.attributes if k in ("href", "src") and not v.startswith("#")]
    assert all(v.startswith("data:image/png;base64,") for v in loaded)
    assert "@import" not in text and "://" not in text
    ids = [v for k, v in page.attributes if k == "id"]
    assert len(ids) == len(set(ids))
    return page


def make_run(folder: Path, *, names: tuple[str, ...] = ("lab-a", "lab-b"), count: int = 3, **changes: Any) -> Path:
    """A completed run that encrypts everything. changes: values of files by their stem, None for no file."""
    folder.mkdir(parents=True)
    layers = [
        {"name": f"model.layers.{k}.self_attn.{m}", "m": 8, "n": 8} for k in range(2) for m in ("q_proj", "v_proj")
    ]
    nodes = {name: {"rank": 2 + 2 * k, "samples": 10 + k, **scores(k)} for k, name in enumerate(names)}
    files: dict[str, Any] = {
        "settings": {
            "overrides": "name=made model.name=/home/someone/models/my-llama",
            "method": {"name": "sealed", "select": "all", "share": "alternate", "aggregate": "separate"},
            "model": {"name": "/home/someone/models/my-llama", "task": "causal_lm"},
            "crypto": {"backend": "ckks_packed"},
            "federation": {"min_contributors": 2, "rounds": count},
            "training": {"steps": 5},
            "name": "made",
        },
        "versions": {"ciphertune": "0.1.0"},
        "plan": {
            "members": [{"name": n, "rank": 2 + 2 * k, "samples": 10 + k} for k, n in enumerate(names)],
            "layers": layers, "heads": [], "scale": 2.0, "tiers": [2], "share": "alternate", "select": "all",
            "fit_rank": "nested",
        },
        "rounds": [line for r in range(count) for line in lines_of(r, names)],
        "summary": {
            "status": "completed", "method": "sealed", "rounds": count, "seconds": 75.0, **scores(0),
            "bytes_up": 1000.0, "bytes_down": 2000.0, "encrypted_fraction": 1.0, "nodes": nodes,
        },
    }  # fmt: skip
    for stem, values in (files | changes).items():
        if values is None:
            continue
        if stem == "rounds":
            (folder / "rounds.jsonl").write_text("".join(json.dumps(x) + "\n" for x in values))
        elif stem == "settings":
            (folder / "settings.yaml").write_text(yaml.safe_dump(values))
        else:
            (folder / f"{stem}.json").write_text(json.dumps(values))
    return folder


def scores(k: int) -> dict[str, Any]:
    """What a client, or the mean, reached."""
    return {
        name: {"loss": loss + k / 8, "metric": {"perplexity": 9.0}}
        for name, loss in (("base", 4.0), ("local", 3.5), ("federated", 3.25))
    }


def lines_of(round_: int, names: tuple[str, ...]) -> list[dict[str, Any]]:
    """The lines of a round."""
    found: list[dict[str, Any]] = []
    for name in names:
        at = {"round": round_, "node": name}
        found += [at | {"stage": s, "seconds": t} for s, t in (("load", 0.5), ("train", 4.0), ("seal", 0.25))]
        sizes = {"bytes_up": 1000, "bytes_down": 2000 * bool(round_), "clear_bytes": 0, "cipher_bytes": 900}
        values = {"values_clear": 0, "values_cipher": 128, "samples": 10, "loss": 4 - round_ / 4, "train_loss": 3.0}
        found.append(at | {"stage": "update", **sizes, **values, "metric": {"perplexity": 9.0}})
    server = {"round": round_, "node": "server"}
    found.append(server | {"stage": "aggregate", "seconds": 0.125})
    return [*found, server | {"stage": "round", "seconds": 6.0, "contributors": len(names), "loss": 4 - round_ / 4}]
