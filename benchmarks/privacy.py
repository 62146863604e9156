"""What the audit's attacks read, method by method; `docs/privacy.md` shows what it found.

    python benchmarks/privacy.py --models FOLDER --data FOLDER                     all that is missing
    python benchmarks/privacy.py ... --cells 'encoder/she_lora*'                   a part of it
    python benchmarks/tables.py                                                    the page, from what is there

--models holds minilm-l6 and llama-4m, --data sst2 and tinystories_excerpt. Three kinds of cells: `gradient/...` attacks
the gradient of one batch at a warm adapter, as the papers do; `encoder/...` and `causal/...` attack what two clients of
the product send in two rounds of AdamW; `membership/...` asks the finished adapter. Each cell is kept in
benchmarks/results/privacy.json as soon as it is done.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from rich.progress import track

from ciphertune.audit.dictionary import Dictionary, dictionary, special_ids
from ciphertune.audit.metadata import facts
from ciphertune.audit.pursuit import Block
from ciphertune.audit.recovery import look_up, passing
from ciphertune.audit.run import ADAMW_NOISE, Auditor, audit
from ciphertune.audit.simulate import simulate
from ciphertune.audit.span import THRESHOLD
from ciphertune.audit.view import read_view
from ciphertune.lm import model as lm_model
from ciphertune.lm.batches import collate, loss_sum
from ciphertune.lm.formats import Encoded
from ciphertune.runs import write_json
from ciphertune.settings import ModelSettings, compose
from ciphertune.versions import versions

ROOT = Path(__file__).parents[1]
OUT = ROOT / "benchmarks/results/privacy.json"
SEEDS, BATCHES, STEPS = (10, 11), (1, 4, 16), (1, 10)  # no constant was chosen while looking at these seeds
METHODS = {
    "fedavg": "method=fedavg",
    "dp_lora epsilon 8": "method=dp_lora method.epsilon=8",
    "she_lora 0.125 %": "method=she_lora",
    "she_lora 1.6 %": "method=she_lora",
    "she_lora 25 %": "method=she_lora",
    "she_lora 95 %": "method=she_lora",
    "drop_columns 1.6 %": "method=drop_columns",
    "fedshield": "method=fedshield",
    "sealed": "method=sealed",
}
GRADIENT_RANKS, GRADIENT_BATCHES = (8, 16), (1, 2, 4)
HIDDEN = (0.0, 0.0125, 0.25, 0.75, 0.95)
EXACT_NOISE = 1e-4  # float32 gradients are combinations but for rounding
COMMON = (
    "data=jsonl data.partition=iid data.max_train=400 data.max_heldout=100 model.max_length=24 "
    "federation.rounds=2 federation.min_clients=2 federation.compare_local=false training.learning_rate=1e-3 "
    "training.threads=1"
)
# of a federation whose finished adapter is attacked
ROUNDS, MEMBER_STEPS, MEMBER_BATCH = 10, 10, 8
MEMBERS = f"data.max_train=200 data.max_heldout=200 training.learning_rate=3e-3 federation.rounds={ROUNDS}"
LENGTHS = (14, 18)  # tokens of a sentence whose gradient is attacked


def cells() -> list[str]:
    """All cells, the quick ones first."""
    rounds = [f"{b}/{k}" for k in STEPS for b in BATCHES]
    order = [f"{kind}/{m}/{r}" for kind in ("causal", "encoder") for r in rounds for m in METHODS]
    gradient = [f"gradient/{opt}/{r}/{b}" for opt in ("sgd", "adamw") for r in GRADIENT_RANKS for b in GRADIENT_BATCHES]
    members = [f"membership/{kind}/{m}" for kind in ("causal", "encoder") for m in METHODS]
    return [*gradient, *order, *members]


def words(kind: str, method: str, batch: int, steps: int, seed: int, models: Path, data: Path) -> str:
    """The overrides of one federation."""
    share = float(method.split()[1]) / 100 if "%" in method else 0.0125
    clients = ",".join([f"{{rank:8,budget:{share:g}}}"] * 2)
    name, texts = ("minilm-l6", "sst2") if kind == "encoder" else ("llama-4m", "tinystories_excerpt")
    model = "classifier data.labels=[negative,positive]" if kind == "encoder" else "hf"
    return (
        f"{METHODS[method]} model={model} model.name={models / name} model.dtype=float32 {COMMON} "
        f"data.path={data / texts / 'train.jsonl'} data.heldout_path={data / texts / 'test.jsonl'} data.seed={seed} "
        f"federation.clients=[{clients}] training.batch_size={batch} training.steps={steps} seed={seed}"
    )


def federation(cell: str, seed: int, models: Path, data: Path) -> list[dict[str, Any]]:
    """What the audit says of the first client of one federation, round by round."""
    kind, method, batch, steps = cell.split("/")
    with tempfile.TemporaryDirectory() as scratch:
        overrides = words(kind, method, int(batch), int(steps), seed, models, data)
        settings = compose(ROOT / "conf", f"{overrides} runs_dir={scratch} name=audited")
        folder = simulate(settings, 2)
        report = audit(folder, node="client-0")
    return [
        {"seed": seed, "round": r.round, "attack": f"{r.name} {r.form}", "recall": r.recall, "chance": r.chance,
         "rouge1": r.rouge1, "rouge2": r.rouge2, "clear_tensors": report.clear_tensors, "passed": report.passed}
        for r in report.attacks
    ]  # fmt: skip


def membership(cell: str, seed: int, models: Path, data: Path) -> list[dict[str, Any]]:
    """Who is told to have been a member by the finished adapter of a federation, and what the metadata say."""
    _, kind, method = cell.split("/")
    with tempfile.TemporaryDirectory() as scratch:
        overrides = f"{words(kind, method, MEMBER_BATCH, MEMBER_STEPS, seed, models, data)} {MEMBERS}"
        settings = compose(ROOT / "conf", f"{overrides} runs_dir={scratch} name=audited")
        folder = simulate(settings, ROUNDS, finish=True)
        found = read_view(folder)
        auditor = Auditor(found, folder / "clients", lambda _, __: None)
        inferred = auditor.membership()
        assert inferred is not None
        return [{"seed": seed, **asdict(inferred), "facts": facts(found)}]


def gradient(cell: str, seed: int, models: Path, data: Path) -> list[dict[str, Any]]:
    """The attacks on the gradient of A in the first layer's query and value, for each share of hidden columns."""
    _, optimizer, rank, batch = cell.split("/")
    settings = ModelSettings(
        name=str(models / "minilm-l6"), task="classification", targets=("query", "value"), rank=int(rank),
        dtype="float32", max_length=LENGTHS[1],
    )  # fmt: skip
    model = lm_model.load(settings, rank=int(rank), labels=("negative", "positive"), device="cpu", seed=seed)
    found, texts = dictionary(model, LENGTHS[1]), _sentences(model, data, int(batch), seed)
    change = _gradient(model, texts, found, seed)
    noise = EXACT_NOISE
    if optimizer == "adamw":  # the first step of Adam is the sign of the gradient
        change, noise = np.sign(change), ADAMW_NOISE
    rows = []
    for hidden in HIDDEN if optimizer == "sgd" else (0.0,):
        width = found.width
        kept = np.sort(np.random.default_rng(seed).permutation(width)[: width - round(hidden * width)])
        whole = np.zeros_like(change)
        whole[:, kept] = change[:, kept]
        block = Block(change[:, kept], lambda d, kept=kept: d[:, kept])
        tried = {"adapted": look_up([block], found, noise=noise)}
        if hidden in (0.0, 0.0125):
            tried["published"] = passing(whole, found, THRESHOLD)
        for form, got in tried.items():
            true = {t for e in texts for t in e.input_ids} - special_ids(model)
            read = got.set - special_ids(model)
            rows.append({"seed": seed, "hidden": hidden, "form": form, "recall": len(true & read) / len(true),
                         "precision": len(true & read) / max(1, len(read))})  # fmt: skip
    return rows


def _sentences(model: lm_model.LoraModel, data: Path, batch: int, seed: int) -> list[Encoded]:
    lines = [json.loads(x) for x in (data / "sst2/train.jsonl").read_text().splitlines()]
    ids = model.tokenizer([x["text"] for x in lines])["input_ids"]
    fits = [i for i, row in enumerate(ids) if LENGTHS[0] <= len(row) <= LENGTHS[1]]
    chosen = np.random.default_rng(seed).choice(fits, batch, replace=False)
    return [Encoded(tuple(ids[i]), int(str(lines[i]["label"]) in ("1", "positive"))) for i in chosen]


def _gradient(model: lm_model.LoraModel, texts: list[Encoded], found: Dictionary, seed: int) -> np.ndarray:
    """The gradients of A of the layers that read tokens, one below the other, at a B that has moved."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        for name, parameter in model.trainable().items():
            if name.endswith("lora_B"):
                parameter.normal_(0, 0.02)
    model.model.eval()
    summed, _ = loss_sum(model, collate(texts, model))
    (summed / len(texts)).backward()
    named = model.trainable()
    return np.concatenate([named[f"{n}.lora_A"].grad.double().numpy() for n in found.layers])


def kept() -> dict[str, Any]:
    """What has been measured."""
    return json.loads(OUT.read_text()) if OUT.is_file() else {"about": {}, "cells": {}}


def missing(wanted: str) -> Iterator[tuple[str, int]]:
    """(cell, seed) still to be run."""
    done = kept()["cells"]
    for seed in SEEDS:
        for cell in cells():
            if fnmatch.fnmatch(cell, wanted) and not any(r["seed"] == seed for r in done.get(cell, [])):
                yield cell, seed


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cells", default="*")
    parser.add_argument("--most", type=int, help="stop after this many")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for cell, seed in track(list(missing(options.cells))[: options.most], description="privacy"):
        run = {"gradient": gradient, "membership": membership}.get(cell.split("/")[0], federation)
        rows = run(cell, seed, options.models.resolve(), options.data.resolve())
        found = kept()
        found["about"] = {"versions": versions(), "threshold": THRESHOLD, "noise": ADAMW_NOISE, "common": COMMON}
        found["cells"].setdefault(cell, []).extend(rows)
        write_json(OUT, found)


if __name__ == "__main__":
    main()
