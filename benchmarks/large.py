"""One client's round at the shapes of a large model: seconds per stage, bytes, memory. Weights are random.

    python benchmarks/large.py                                           a small Llama, for any machine
    python benchmarks/large.py --shape llama-2-7b                        needs a GPU that holds it in bfloat16
    python benchmarks/large.py --shape llama-2-7b --quantization 4bit    needs bitsandbytes, and less memory

Trained on random tokens, read to numpy, sealed, summed with a second client's update, unsealed, written back: the
package's own functions, timed where they are called. The base model is drawn weight by weight on the device in its own
type, on the way by which a real one is loaded, so no copy of it in float32 or in the CPU's memory counts. Seconds of
sending follow from the bytes and --line. Peaks are of the process so far (CPU) and of the stage (CUDA).
Results go to benchmarks/results/large.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from ciphertune import exchange, wire
from ciphertune.adapter import Adapter, LoraFactors
from ciphertune.aggregation import SeparateSum, cut
from ciphertune.build import make_plan, session
from ciphertune.build_client import generate_key, open_key
from ciphertune.greeting import shapes
from ciphertune.lm import quantization
from ciphertune.lm.base import pick_autocast, pick_device
from ciphertune.lm.data import Encoded
from ciphertune.lm.model import LoraModel, adapt
from ciphertune.lm.train import train
from ciphertune.ranks import Contributor
from ciphertune.settings import Settings, compose
from ciphertune.versions import versions

ROOT = Path(__file__).parents[1]
SHAPES = {
    "small": {"hidden": 512, "layers": 8, "intermediate": 1376, "heads": 8, "rank": 8, "length": 128},
    "llama-2-7b": {"hidden": 4096, "layers": 32, "intermediate": 11008, "heads": 32, "rank": 32, "length": 512},
}
SAMPLES = (1000, 600)  # of the two clients


class Drawn:
    """Stands for a weight in a file, as `from_pretrained` sees it: made when it is read, on the device, in its type."""

    def __init__(self, name: str, shape: torch.Size, device: torch.device, dtype: torch.dtype) -> None:
        self.name, self.shape, self.device, self.dtype = name, shape, device, dtype

    def __getitem__(self, _: Any) -> torch.Tensor:
        values = torch.empty(self.shape, device=self.device, dtype=self.dtype)
        if len(self.shape) < 2:
            return values.fill_(1.0)  # norms
        generator = torch.Generator(self.device).manual_seed(zlib.crc32(self.name.encode()))
        return values.normal_(0.0, 0.02, generator=generator)


@dataclass
class Meter:
    """Seconds and peaks of memory per stage; memory in bytes."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)
    rss: dict[str, int] = field(default_factory=dict)
    cuda: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Measure what is inside as `stage`."""
        gpu = self.device.type == "cuda"
        if gpu:
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        start = time.perf_counter()
        yield
        if gpu:
            torch.cuda.synchronize(self.device)
            self.cuda[stage] = torch.cuda.max_memory_allocated(self.device)
        self.seconds[stage] = time.perf_counter() - start
        unit = 1 if sys.platform == "darwin" else 1024
        self.rss[stage] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def build(options: argparse.Namespace, settings: Settings, device: torch.device) -> LlamaForCausalLM:
    """A Llama of the shape asked for, with random weights, on `device`, quantized if asked."""
    dtype = pick_autocast(settings.model.dtype, device) or torch.float32
    config = LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        max_position_embeddings=max(options.length, 2048),
        use_cache=False,
    )
    with torch.device("meta"):
        wanted = LlamaForCausalLM(config).state_dict()
    return LlamaForCausalLM.from_pretrained(
        None,
        config=config,
        state_dict={name: Drawn(name, value.shape, device, dtype) for name, value in wanted.items()},
        dtype=dtype,
        device_map={"": str(device)},
        **quantization.options(settings.model.quantization, dtype),
    )


def compose_settings(options: argparse.Namespace) -> Settings:
    """The settings of a run of `sealed` with the model options of the command line."""
    model = [f"targets=[{','.join(options.targets)}]", f"rank={options.rank}", f"alpha={2 * options.rank}"]
    model += [f"max_length={max(8, options.length)}", f"dtype={options.dtype}", f"quantization={options.quantization}"]
    model += [f"gradient_checkpointing={str(options.checkpointing).lower()}"]
    training = [f"training.steps={options.steps}", f"training.batch_size={options.batch}"]
    return compose(ROOT / "conf", ["method=sealed", "model=hf", *(f"model.{word}" for word in model), *training])


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One round of one client; what `main` writes."""
    settings = compose_settings(options)
    device = pick_device(options.device)
    quantization.check(settings.model.quantization, device)
    meter = Meter(device)
    with meter("build"):
        base = build(options, settings, device)
    with meter("adapt"):
        model = adapt(base, SimpleNamespace(pad_token_id=0, eos_token_id=None), settings.model, rank=options.rank)
    where = _addresses(base)
    initial = model.read()
    part = open_key(settings.crypto, generate_key(settings.crypto))
    layers, heads = shapes(initial)
    plan = make_plan(settings, layers, heads, (options.rank,))
    link = session(settings, plan, run=1, key_fingerprint=part.fingerprint)
    factors = plan.factors(0)
    model.freeze("" if len(factors) != 1 else "a" if factors == ("b",) else "b")
    with meter("train"):
        losses = _train(model, settings, options)
    with meter("read"):
        trained = model.read()
    total = sum(SAMPLES)
    with meter("seal"):
        mine = exchange.seal(trained, link, part, round_=0, sender=1, samples=SAMPLES[0], total=total)
    second = other(trained)
    theirs = exchange.seal(second, link, part, round_=0, sender=2, samples=SAMPLES[1], total=total)
    with meter("server"):
        running = SeparateSum(link, 0, total)
        for number, data in enumerate((mine, theirs)):
            running.add(data, sender=number + 1, who=Contributor(options.rank, SAMPLES[number]))
        answer = wire.encode(cut(running.release(2), link, options.rank), link)
    with meter("unseal"):
        mean, _ = exchange.unseal(answer, link, part, round_=0, rank=options.rank, base=trained)
    with meter("write"):
        model.write(mean)
    if _addresses(base) != where:
        raise RuntimeError("a weight of the base model has moved: there was a second copy of it")
    meter.seconds["send"], meter.seconds["receive"] = len(mine) / options.line, len(answer) / options.line
    return {
        "seconds": {stage: round(value, 4) for stage, value in meter.seconds.items()},
        "seconds_per_step": round(meter.seconds["train"] / options.steps, 4),
        "tokens_per_second": round(options.steps * options.batch * options.length / meter.seconds["train"], 1),
        "bytes": {
            "base": sum(p.numel() * p.element_size() for p in base.parameters()) - _bytes(trained),
            "adapter": _bytes(trained),
            "up": len(mine),
            "down": len(answer),
        },
        "peak_rss_bytes": meter.rss,
        "peak_cuda_bytes": meter.cuda,
        "losses": [round(loss, 4) for loss in losses],
        "largest_error_of_the_mean": error(mean, trained, second, factors),
        "values_sealed": sum(getattr(f, x).size for f in trained.layers.values() for x in factors),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "dtype": str(pick_autocast(settings.model.dtype, device) or torch.float32).removeprefix("torch."),
    }


def _train(model: LoraModel, settings: Settings, options: argparse.Namespace) -> tuple[float, ...]:
    draw = np.random.default_rng(0)
    rows = draw.integers(3, options.vocabulary, (options.steps * options.batch, options.length)).tolist()
    data = [Encoded(tuple(row), tuple(row)) for row in rows]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, transient=True, console=Console(stderr=True)) as bar:
        task = bar.add_task("training", total=options.steps)
        result = train(
            model, data, settings.training, seed=0, progress=lambda done, _, loss: bar.update(task, completed=done)
        )
    return result.losses


def other(mine: Adapter) -> Adapter:
    """Another client's adapter: factors of the same shapes, of the size that training gives them."""
    draw = np.random.default_rng(1)
    layers = {
        name: LoraFactors(
            draw.normal(0, 0.02, f.a.shape).astype(np.float32), draw.normal(0, 0.02, f.b.shape).astype(np.float32), 2.0
        )
        for name, f in mine.layers.items()
    }
    return Adapter(layers, {})


def error(mean: Adapter, one: Adapter, two: Adapter, factors: tuple[str, ...]) -> float:
    """The largest difference of what was unsealed from the mean computed in the open, in float64."""
    share = SAMPLES[0] / sum(SAMPLES)
    found = [
        np.abs(getattr(f, x) - (share * getattr(one.layers[n], x) + (1 - share) * getattr(two.layers[n], x))).max()
        for n, f in mean.layers.items()
        for x in factors
    ]
    return float(max(found))


def _addresses(base: LlamaForCausalLM) -> dict[str, int]:
    """Where each weight of the base lies; PEFT's factors are among its parameters too."""
    return {name: p.data_ptr() for name, p in base.named_parameters() if "lora_" not in name}


def _bytes(adapter: Adapter) -> int:
    return sum(f.a.nbytes + f.b.nbytes for f in adapter.layers.values()) + sum(h.nbytes for h in adapter.heads.values())


def parse(words: list[str] | None) -> argparse.Namespace:
    """The command line; what it leaves open is as in --shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="small")
    for name in SHAPES["small"]:
        parser.add_argument(f"--{name}", type=int, help="default: as in --shape")
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--targets", nargs="+", default=["q_proj", "v_proj"])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--quantization", choices=("none", "4bit", "8bit"), default="none")
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--line", type=float, default=12.5e6, help="bytes per second, each way (default: 100 Mbit/s)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/large.json")
    options = parser.parse_args(words)
    for name, value in SHAPES[options.shape].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def main(words: list[str] | None = None) -> None:
    """Measure, print, write."""
    transformers_logging.disable_progress_bar()
    options = parse(words)
    found = measure(options)
    asked = {key: value for key, value in vars(options).items() if key != "out"}
    about = {**asked, "machine": platform.machine(), "threads": torch.get_num_threads(), "versions": versions()}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"about": about, **found}, indent=2) + "\n")
    console = Console(width=100)
    what = f"{options.layers} blocks of {options.hidden}, rank {options.rank}"
    table = Table(title=f"one round: {what}, {found['dtype']}, quantization {options.quantization}, {found['device']}")
    for column in ("stage", "seconds", "peak CPU (so far)", "peak CUDA"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for stage, value in found["seconds"].items():
        memory = [found[key].get(stage) for key in ("peak_rss_bytes", "peak_cuda_bytes")]
        table.add_row(stage, f"{value:.3f}", *("" if x is None else f"{x / 1e9:.2f} GB" for x in memory))
    console.print(table)
    sizes = ", ".join(f"{key} {value / 1e6:.1f} MB" for key, value in found["bytes"].items())
    console.print(f"{sizes}; {found['tokens_per_second']:.0f} tokens/s; {found['largest_error_of_the_mean']:.1e} error")


if __name__ == "__main__":
    main()
