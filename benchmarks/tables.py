"""Write the tables of the documents from benchmarks/results/*.json, between their markers.

python benchmarks/tables.py            rewrite
python benchmarks/tables.py --check    exit 1 when a document differs from the results
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import privacy_page
import results_page
import results_plot

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
DOCUMENTS = ("README.md",)


def round_table(found: dict[str, Any]) -> list[str]:
    """benchmarks/round.py."""
    rows = [
        "| method | up | down | total against `fedavg` | client seconds | server seconds |",
        "|---|---|---|---|---|---|",
    ]
    for name, r in found["methods"].items():
        client = sum(s for stage, s in r["seconds"].items() if stage.startswith("client"))
        server = sum(s for stage, s in r["seconds"].items() if stage.startswith("server"))
        sizes = f"{r['bytes_up'] / 1e3:.0f} kB | {r['bytes_down'] / 1e3:.0f} kB | {r['ratio_total']:.2f}"
        rows.append(f"| `{name}` | {sizes} | {client:.3f} | {server:.3f} |")
    many = found["about"]["many"]
    shapes = {found["about"]["shape"]: found} | found["shapes"]
    heads = " | ".join(f"{shape} | of {many} clients" for shape in shapes)
    rows += [
        "",
        f"Total against `fedavg` by shape: | {heads} |".replace("Total", "| Total"),
        "|" + "---|" * (1 + 2 * len(shapes)),
    ]
    for name in found["methods"]:
        cells = (shape["methods"][name] for shape in shapes.values())
        ratios = " | ".join(f"{r['ratio_total']:.2f} | {r['ratio_total_many']:.2f}" for r in cells)
        rows.append(f"| `{name}` | {ratios} |")
    return rows


def default_table(found: dict[str, Any]) -> list[str]:
    """benchmarks/default.py: the embedded default, as `ciphertune run` prints it."""
    rows = ["| client | rank | examples | base | alone | federated | up per round | down per round |", "|---|" * 8]
    rows[1] = "|" + "---|" * 8
    for name, r in [*found["nodes"].items(), ("all", found)]:
        scores = " | ".join(f"{r[k]['loss']:.3f}" for k in ("base", "local", "federated"))
        sizes = f"{r['bytes_up'] / 1e3:.0f} kB | {r['bytes_down'] / 1e3:.0f} kB"
        rows.append(f"| {name} | {r.get('rank', '')} | {r.get('samples', '')} | {scores} | {sizes} |")
    return rows


def _largest(values: Any) -> float:
    return max(values.values()) if isinstance(values, dict) else float(values)


def she_lora_table(found: dict[str, Any]) -> list[str]:
    """benchmarks/she_lora.py: bytes are exact, seconds are rounded to two digits."""
    names = {
        "reported": "1 column per ciphertext, reported",
        "reported_packed": "4 columns per ciphertext, reported",
        "column": "1 column per ciphertext, extrapolated",
        "whole_a": "all of A encrypted, extrapolated",
        "plaintext": "A and B in the clear",
    }
    rows = [
        "| layers, ranks, budget | how | ciphertexts up | up (ciphertext) | down "
        "| client seal | server multiply | server in all | client decrypt + SVD | cut by the rank cap |",
        "|" + "---|" * 10,
    ]

    def line(what: str, how: str, r: dict[str, Any]) -> str:
        down = f"{r['bytes_down'] / 1e6:,.1f} MB" if "bytes_down" in r else "-"
        up = f"{r['bytes_up'] / 1e6:,.1f} ({r['cipher_bytes_up'] / 1e6:,.1f}) MB"
        stages = (("client seal",), ("server multiply",), ("server release",), ("client decrypt", "client svd"))
        spent = [[r["seconds"][s] for s in stage if s in r["seconds"]] for stage in stages]
        times = (f"{float(f'{sum(s):.2g}'):,g} s" if s else "-" for s in spent)
        cut = f"{_largest(r['truncation']):.0%}" if "truncation" in r else "-"
        return f"| {what} | {how} | {r['ciphertexts_up']:,.0f} | {up} | {down} | {' | '.join(times)} | {cut} |"

    for setting in found["settings"].values():
        ranks = f"{setting['layers']}, {'/'.join(map(str, setting['ranks']))}"
        for budget, result in setting["budgets"].items():
            what = f"{ranks}, {float(budget) * 100:g} %"
            rows.append(line(what, "`she_lora`", result["she_lora"]))
            rows += [line(what, names[k], r) for k, r in result["peers"].items()]
        rows += [line(f"{ranks}, any", names[k], r) for k, r in setting["peers"].items()]
    return [
        *rows,
        "",
        "Sizes per client, seconds of the processor. Reported: by the method's authors' code in their own run, wall "
        "time of four server workers, not measured here. Extrapolated: from samples on this machine, the SVD from "
        "one layer. Cut: of the norm of random factors, whose spectrum is flat.",
    ]


def she_lora_accuracy_table(found: dict[str, Any]) -> list[str]:
    """benchmarks/she_lora_accuracy.py."""
    rows = [
        "| data | method | accuracy, mean and spread over seeds | up per round | down per round | encrypted |",
        "|---|---|---|---|---|---|",
    ]

    def line(data: str, name: str, r: dict[str, Any]) -> str:
        spread = "" if r["spread"] is None else f" ± {100 * r['spread']:.1f}"
        sizes = f"{r['bytes_up'] / 1e3:.0f} kB | {r['bytes_down'] / 1e3:.0f} kB | {r['encrypted_fraction']:.1%}"
        return f"| {data} | {name} | {100 * r['accuracy']:.1f} %{spread} | {sizes} |"

    gaps = []
    for data, methods in found["data"].items():
        rows += [line(data, f"`{name}`", methods[name]) for name in ("flexlora", "she_lora")]
        gap = methods["difference"]
        gaps.append(f"{data} {100 * gap['accuracy']:+.2f} ± {100 * gap['spread']:.2f} points")
    for r in found["budgets"]:
        rows.append(line(found["budgets_data"], f"`she_lora`, every budget {r['budget']:.0%}, one seed", r))
    return [*rows, "", f"`she_lora` minus `flexlora`, mean and spread over seeds: {'; '.join(gaps)}."]


def fedshield_table(found: dict[str, Any]) -> list[str]:
    """benchmarks/fedshield.py."""
    rows = ["| mask | rate | up | down | up against plaintext | both ways against the published code |", "|---|" * 6]
    rows[1] = "|" + "---|" * 6
    names = {"own": "own (the paper)", "agreed": "agreed (ours)", "published": "published code, from a sample"}
    for r in found["rows"]:
        rate = "any" if r["rate"] is None else f"{r['rate']:g}"
        sizes = f"{r['bytes_up'] / 1e6:.2f} MB | {r['bytes_down'] / 1e6:.2f} MB"
        ratios = f"{r['up_over_plaintext']:.2f} | {r['total_over_published']:.3f}"
        rows.append(f"| {names.get(r['mask'], r['mask'])} | {rate} | {sizes} | {ratios} |")
    claims = []
    for name, rate in found["from_which_rate_40_percent_less"].items():
        shown = {k: "at no measured rate" if v is None else f"from rate {v:g}" for k, v in rate.items()}
        claims.append(f"{name}: communication {shown['communication']}, computation {shown['computation']}")
    return [*rows, "", f"The paper's claim, 40 % less than the baseline, holds with the {'; with the '.join(claims)}."]


def crypto_table(found: dict[str, Any]) -> list[str]:
    """benchmarks/crypto.py: bytes are exact, seconds of the processor as ratios to row A."""
    many = found["about"]["many"]
    rows = [
        f"| encryption | client encrypts | server adds | client decrypts | decrypts a sum of {many} | up | down "
        f"| down, sum of {many} | largest error |",
        "|" + "---|" * 9,
    ]
    for r in found["rows"].values():
        stages = ("client encrypt", "server add", "client decrypt", "client decrypt many")
        times = [f"{r['over_a'][s]:.3f}" if s in r["over_a"] else "same" for s in stages]
        sizes = [f"{r['bytes_per_value'][w]:.2f}" for w in ("up", "down", "down_many")]
        rows.append(f"| {r['label']} | {' | '.join(times)} | {' | '.join(sizes)} | {r['error_of_mean']:.0e} |")
    aims = "; ".join(
        f"{a['name']} {a['found']:.3f} (aim {a['wanted']:g}, {'met' if a['met'] else '**missed**'})"
        for a in found["aims"]
    )
    about = found["about"]
    return [
        *rows,
        "",
        f"Seconds as ratios to row A; bytes per value. {about['values']:,} values, {about['clients']} clients, medians "
        f"of {about['repeat']}. Aims, as ratios to A: {aims}.",
    ]


def scale_table(found: dict[str, Any]) -> list[str]:
    """benchmarks/scale.py: what was foreseen beside what was measured."""
    rows = [
        "| method | | up | down | client seals | client opens | server adds | server releases | client peak "
        "| server peak |",
        "|" + "---|" * 10,
    ]
    for name, r in found["methods"].items():
        for kind in ("forecast", "measured"):
            f = r[kind]
            sizes = " | ".join(f"{f[w] / 1e6:.1f} MB" for w in ("bytes_up", "bytes_down"))
            stages = ("seal_seconds", "unseal_seconds", "add_seconds", "release_seconds")
            times = " | ".join(f"{f[s]:.2f} s" for s in stages)
            peaks = " | ".join(f"{f[w] / 2**20:,.0f} MiB" for w in ("client_memory", "server_memory"))
            rows.append(f"| `{name}` | {kind} | {sizes} | {times} | {peaks} |")
    about = found["about"]
    return [
        *rows,
        "",
        f"{about['model']}, rank {about['rank']}, {about['clients']} clients; per client and round, the server for "
        "all of them. Peaks are what a process rose by after its libraries were loaded.",
    ]


def large_message_table(found: dict[str, Any]) -> list[str]:
    """benchmarks/large_message.py."""
    rows = [
        "| exchange | up per client | down per client | client's own work | in transit | largest error |",
        "|---|" * 6,
    ]
    rows[1] = "|" + "---|" * 6
    names = ("first round (B)", "second round (A)", "last look")
    for name, r in zip(names, found["exchanges"], strict=True):
        error = f"{r['largest_error']:.0e}" if "largest_error" in r else "-"
        sizes = " | ".join(f"{r[w] / 1e6:.1f} MB" for w in ("bytes_up", "bytes_down"))
        rows.append(f"| {name} | {sizes} | {r['client_seconds']:.0f} s | {r['transit_seconds']:.0f} s | {error} |")
    peaks = ", ".join(f"{kind} {value:,.0f} MiB" for kind, value in found["peak_mib"].items())
    about = found["about"]
    return [
        *rows,
        "",
        f"{about['model']}, rank {about['rank']}, {about['clients']} clients. Largest resident sets: {peaks}.",
    ]


def load_table(found: dict[str, Any]) -> list[str]:
    """benchmarks/load.py: every fourth round."""
    about, ends = found["about"], found["rounds"]
    shown = [r for r in ends if r["round"] in {1, len(ends)} or r["round"] % 5 == 0]
    head = " | ".join(f"round {r['round']}" for r in shown)
    rows = [f"| | {head} |", "|" + "---|" * (1 + len(shown))]
    rows.append("| server's resident set | " + " | ".join(f"{r['server_mib']:,.0f} MiB" for r in shown) + " |")
    rows.append("| seconds | " + " | ".join(f"{r['seconds']:.0f}" for r in shown) + " |")
    growth = found["growth_mib_per_round"]
    ranks = ", ".join(map(str, about["ranks"]))
    return [
        *rows,
        "",
        f"{about['clients']} simulated clients of ranks {ranks} on {about['cpus']} processors, {about['fraction']:.0%} "
        f"asked per round, {found['different_clients']} different ones in all. Growth over the second half: "
        f"{growth:+.2f} MiB per round. What the server keeps on disk to resume: {found['state_bytes'] / 1e3:.0f} kB "
        "beside the aggregates.",
    ]


TABLES: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "round": round_table,
    "crypto": crypto_table,
    "scale": scale_table,
    "large_message": large_message_table,
    "load": load_table,
    "fedshield": fedshield_table,
    "she_lora_accuracy": she_lora_accuracy_table,
    "default": default_table,
    "she_lora": she_lora_table,
}


def filled(text: str) -> str:
    """`text` with every marked table made anew."""

    def table(match: re.Match[str]) -> str:
        name = match[1]
        lines = (
            results_page.summary()
            if name == "grid"
            else TABLES[name](json.loads((RESULTS / f"{name}.json").read_text()))
        )
        return "\n".join([f"<!-- table {name} -->", *lines, "<!-- end -->"])

    return re.sub(r"<!-- table (\w+) -->.*?<!-- end -->", table, text, flags=re.DOTALL)


def main() -> int:
    """Rewrite or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    status = 0
    made = {name: filled((ROOT / name).read_text(encoding="utf-8")) for name in DOCUMENTS}
    made |= {"docs/results.md": results_page.page(), "docs/privacy.md": privacy_page.page()}
    for name, text in made.items():
        path = ROOT / name
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        if check:
            print(f"{name} differs from benchmarks/results: run python benchmarks/tables.py", file=sys.stderr)
            status = 1
        else:
            path.write_text(text, encoding="utf-8")
    figure = ROOT / "docs/results.svg"
    if not results_plot.is_current(figure):
        if check:
            print("docs/results.svg shows other results: run python benchmarks/tables.py", file=sys.stderr)
            status = 1
        else:
            results_plot.plot(figure)
    return status


if __name__ == "__main__":
    sys.exit(main())
