"""What a server learns beside the updates: sizes, times, ranks, sample counts, codes. Plain sentences, no attack."""

from __future__ import annotations

from collections import defaultdict

from ciphertune.audit.view import View
from ciphertune.runs import Line, damage, read_lines


def facts(view: View) -> list[str]:
    """One sentence per fact that the server's own files state."""
    found = [_who(view), _weights(view), _sizes(view), *_codes(view)]
    lines, damaged = read_lines(view.folder)
    lost = f"rounds.jsonl: {damage(damaged)}" if damaged else ""
    return [x for x in (*found, _times(lines), _losses(lines), lost) if x]


def _who(view: View) -> str:
    names = sorted({s.node for s in view.seen})
    ranks = {s.node: s.message.contributors[0].rank for s in view.seen}
    return "clients and the components they share: " + ", ".join(f"{n} {ranks[n]}" for n in names) if names else ""


def _weights(view: View) -> str:
    counts = {s.node: s.message.contributors[0].samples for s in view.seen}
    if not counts:
        return ""
    what = "training examples" if view.settings.method.weighting == "samples" else "weights (norms of updates)"
    return f"{what}: " + ", ".join(f"{n} {c}" for n, c in sorted(counts.items()))


def _sizes(view: View) -> str:
    by_shape: dict[tuple[int, ...], set[int]] = defaultdict(set)
    for s in view.seen:
        who = s.message.contributors[0]
        key = (s.message.rank, who.tier, len(s.message.factors), s.round)
        by_shape[key].add(len(s.message.clear) + len(s.message.secret) + len(s.message.mask))
    if not by_shape:
        return ""
    same = all(len(sizes) == 1 for sizes in by_shape.values())
    return (
        "sizes of updates follow from rank, budget and round alone: they say nothing about the text"
        if same
        else "sizes of updates differ between clients of equal rank, budget and round: they depend on something else"
    )


def _codes(view: View) -> list[str]:
    plan = next((s.plan for s in view.seen if s.plan.columns), None)
    if plan is None:
        return []
    hidden, every = sum(plan.hidden(len(plan.budgets) - 1)), sum(x.n for x in plan.layers)
    shares = ", ".join(f"{b:.3%}" for b in plan.budgets)
    return [
        f"budgets of the clients: {shares}; {hidden} of {every} columns of A are hidden by somebody, as codes",
        "the codes are matched to column numbers by the first round's readable columns and the public initial adapter; "
        "the hidden columns are among those that are left",
    ]


def _times(lines: list[Line]) -> str:
    spent: dict[str, list[float]] = defaultdict(list)
    for line in lines:
        if line["stage"] == "train" and "seconds" in line:
            spent[line["node"]].append(float(line["seconds"]))
    return (
        "seconds of training per round: " + ", ".join(f"{n} {sum(s) / len(s):.1f}" for n, s in sorted(spent.items()))
        if spent
        else ""
    )


def _losses(lines: list[Line]) -> str:
    course: dict[str, list[float]] = defaultdict(list)
    for line in lines:
        if line["stage"] == "update" and "loss" in line:
            course[line["node"]].append(float(line["loss"]))
    return (
        "held-out losses, first and last: "
        + ", ".join(f"{n} {x[0]:.3f} to {x[-1]:.3f}" for n, x in sorted(course.items()))
        if course
        else ""
    )
