"""What the server saw of a run, what its method does not protect (SECURITY.md has more), how its adapter is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from ciphertune.report.source import Run, pick
from ciphertune.runs import number

ENCRYPTED, PARTLY, READABLE, ABSENT = "encrypted", "partly", "readable", "not sent"


def protection(run: Run) -> str:
    """`all`, `some` or `none` of the values are encrypted, `nothing` travels at all; empty when settings are lost."""
    select, share = pick(run.settings, "method", "select"), pick(run.settings, "method", "share")
    if select is None:
        return ""
    if share == "none":
        return "nothing"
    if pick(run.settings, "crypto", "backend") == "clear" or select in ("none", "dropped"):
        return "none"
    return "all" if select == "all" else "some"


def headline(run: Run) -> str:
    """What the server could read of updates, in one short sentence."""
    return {
        "all": "The server was sent no entry of an update that it could read.",
        "some": "The server could read the rest: enough to test for words of a client's text.",
        "none": "The server could read every update of every client.",
        "nothing": "No update left a client.",
        "": "The settings of the run are lost.",
    }[protection(run)]


def seen(run: Run, *, heads: bool) -> list[tuple[str, str, str]]:
    """What the server got of each kind: what, how (ENCRYPTED, ...), and in words."""
    method, kind = run.settings.get("method", {}), protection(run)
    if not kind:
        return []
    rows = _entries(method, kind, heads=heads)
    if pick(method, "select") == "negotiated" and kind == "some":
        rows.append(("Which columns of A", PARTLY, "codes, under a key it lacks, in order of sensitivity; budgets"))
    if pick(method, "weighting") == "norm":
        rows.append(("Size of each update", READABLE, "the norm of every client's update"))
    rows.append(("Scores", READABLE, "losses and metrics on held-out text, training losses, seconds"))
    rows.append(("Who", READABLE, "names, addresses, ranks, numbers of examples, sizes and times of messages"))
    return rows


def _entries(method: Mapping[str, Any], kind: str, *, heads: bool) -> list[tuple[str, str, str]]:
    select, share = pick(method, "select"), pick(method, "share")
    noisy = " after clipping and noise" if pick(method, "noise") == "gaussian" else ""
    whole = {
        "all": (ENCRYPTED, "every entry"),
        "none": (READABLE, f"every entry{noisy}"),
        "nothing": (ABSENT, ""),
    }
    if select == "dropped":
        a = (READABLE, "the columns that matter most are not sent, the others are readable")
        b = head = (READABLE, "every entry")
    elif kind == "some" and select == "negotiated":
        a = (PARTLY, "columns within each client's budget encrypted, the others readable")
        b = (READABLE, "every entry")
        head = (ENCRYPTED, "every entry")
    elif kind == "some":
        fraction = number(pick(method, "fraction")) or 0.0
        a = b = head = (PARTLY, f"{fraction:.0%} of the entries encrypted, all in the first round; the others readable")
    else:
        a = b = head = whole[kind]
    if share == "b_only":
        a = (ABSENT, "it stays as it was drawn")
    rows = [("Factor A", *a), ("Factor B", *b)]
    return [*rows, ("Task head", *head)] if heads else rows


def limits(run: Run) -> list[str]:
    """What is not protected, in sentences: of the method first, then of every run."""
    method, kind = run.settings.get("method", {}), protection(run)
    if not kind:
        return ["The settings of this run are lost: nothing can be said of what it protected."]
    found = [_of_selection(method, kind)]
    if pick(method, "aggregate") == "stack":
        found.append("Every client got every other client's factors.")
    if pick(method, "prune") == "own" and pick(method, "prune_mean") == "kept":
        found.append("Every client sees every entry that one client alone kept.")
    if pick(method, "noise") == "gaussian":
        found.append("Epsilon holds for updates; scores, numbers of examples and times are outside of it.")
    if kind in ("all", "some"):
        found.append("All clients share one key: a server that one client helps reads every update.")
    minimum = number(pick(run.settings, "federation", "min_contributors"))
    if minimum is not None and kind != "nothing":
        other = " Of a mean of two, each reads the other's update." if minimum <= 2 else ""
        found.append(f"Clients read means of at least {minimum:.0f} updates.{other}")
    found.append("The finished adapter may itself give away what it was trained on (membership inference).")
    if run.simulated:
        found.append(
            "This run was simulated: server, clients and key were on one machine, which protects nothing there. The "
            "page says what a server of its own would have seen."
        )
    return found


def _of_selection(method: Mapping[str, Any], kind: str) -> str:
    """One sentence on what the method's choice of what to encrypt does not protect."""
    if kind == "nothing":
        return "Nothing was shared but scores, so there was nothing to encrypt, and nobody learned from the others."
    select = pick(method, "select")
    if select == "dropped":
        return "Leaving columns out protects no text: the columns that are sent are readable and can be tested alone."
    if kind == "none" and pick(method, "noise") == "gaussian":
        return "Nothing is encrypted: the server reads every update, and only the noise stands before the text."
    if kind == "none" and select != "none":
        return "crypto=clear is a dry run: nothing was encrypted, and the server could read every update."
    if kind == "none":
        return "Nothing is encrypted: the server reads every update, and text can be reconstructed from updates."
    if select == "negotiated":
        return (
            "The budget is a cost, not a protection: an attacker tests the readable columns and ignores the hidden "
            "ones, B is readable whole, and what clients send after each round shows much of the decrypted mean."
        )
    if select == "entries":
        return "Hiding some entries protects no text: those that stay readable can be tested by themselves."
    return "Encryption of everything keeps updates from the server alone, not from the clients, who all hold the key."


def snippet(run: Run, client: str = "") -> str:
    """Python that loads a client's adapter with PEFT, started in the run folder."""
    model, data = run.settings.get("model", {}), run.settings.get("data", {})
    name = str(pick(model, "name") or "")
    classes = pick(data, "labels") if pick(model, "task") == "classification" else None
    auto = "AutoModelForSequenceClassification" if classes else "AutoModelForCausalLM"
    merged = pick(run.settings, "method", "fit_rank") == "merge"
    base, first = _base(name)
    extra = f", num_labels={len(classes)}" if classes else ""
    place = f"clients/{client or 'NAME'}/adapter"
    lines = [
        *first,
        f"from peft import {'PeftConfig, ' if 'PeftConfig' in base else ''}PeftModel",
        *(["from safetensors.torch import load_file"] if merged else []),
        f"from transformers import {auto}, AutoTokenizer",
        "",
        f"adapter = {place!r}  # in the run folder",
        f"base = {base}",
        f"model = {auto}.from_pretrained(base{extra})",
        *(_MERGED if merged else []),
        "model = PeftModel.from_pretrained(model, adapter)",
        "tokenizer = AutoTokenizer.from_pretrained(base)",
    ]
    return "\n".join(lines)


_MERGED = (
    'for layer, change in load_file(f"{adapter}/merged.safetensors").items():',
    "    model.get_submodule(layer).weight.data += change  # what all rounds added",
)


def _base(name: str) -> tuple[str, list[str]]:
    """The base model as an expression, and the imports it needs. A folder is the client's own: its adapter names it."""
    if name == "embedded":
        return 'str(files("ciphertune") / "assets" / "base")', ["from importlib.resources import files", ""]
    if name and name.count("/") <= 1 and not name.startswith(("/", ".", "~")):
        return repr(name), []
    return f"PeftConfig.from_pretrained(adapter).base_model_name_or_path  # {folder_name(name)!r}", []


def folder_name(name: str) -> str:
    """A model's name without the folders of this machine."""
    return PurePath(name).name if name.startswith(("/", ".", "~")) or name.count("/") > 1 else name
