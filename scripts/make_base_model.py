"""Make the small base model that ships with the package, and its tokenizer, from scratch.

    python scripts/make_base_model.py                 about 10 minutes on one core; into src/ciphertune/assets/base
    python scripts/make_base_model.py --steps 100     a quick look

The text is `ciphertune.lm.embedded.pretraining_text()` of the Python that runs this, and nothing else. The same Python,
torch, seed, number of threads and kind of processor give the same weights.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ciphertune.lm.embedded import pretraining_text, tuning_topics

VOCABULARY = 2048
POSITIONS = 512
LENGTHS = (128, 128, 256, 512)  # tokens of a training example; one length per step
TOKENS = 2048  # per step
WARMUP = 100  # steps
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")

# The part of a conversation that the assistant says is marked, so that a loss can be taken on it alone.
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
{{- '### ' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' %}
{%- generation %}{{ message['content'] + eos_token }}{% endgeneration %}
{{- '\\n' }}
{%- else %}
{{- message['content'] + '\\n\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '### assistant\\n' }}{% endif %}
"""


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on `texts`: every text can be encoded, and decodes to itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=list(SPECIAL),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    bos = SPECIAL.index("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", bos)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def make_model(hidden: int, layers: int, heads: int) -> LlamaForCausalLM:
    """A Llama with random weights and tied embeddings."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=round(hidden * 8 / 3 / 16) * 16,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        initializer_range=0.02,
        pad_token_id=SPECIAL.index("<pad>"),
        bos_token_id=SPECIAL.index("<s>"),
        eos_token_id=SPECIAL.index("</s>"),
    )
    return LlamaForCausalLM(config)


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """All texts in one row, each between its marks. Shape (tokens,), int64."""
    eos = tokenizer.eos_token_id
    return torch.tensor([token for ids in tokenizer(texts)["input_ids"] for token in (*ids, eos)])


def batches(row: torch.Tensor, steps: int, seed: int) -> Iterator[torch.Tensor]:
    """`steps` batches of `TOKENS` tokens cut at random places of `row`. Shape (examples, length)."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        length = LENGTHS[int(torch.randint(len(LENGTHS), (1,), generator=generator))]
        starts = torch.randint(len(row) - length, (TOKENS // length, 1), generator=generator)
        yield row[starts + torch.arange(length)]


@torch.no_grad()
def loss_on(model: LlamaForCausalLM, row: torch.Tensor, length: int = 128) -> float:
    """Mean cross-entropy in nats per token over `row`, cut into pieces of `length` tokens."""
    model.eval()
    pieces = row[: len(row) // length * length].view(-1, length)
    losses = [model(input_ids=part, labels=part).loss.item() * len(part) for part in torch.split(pieces, 32)]
    return float(sum(losses) / len(pieces))


def rate(step: int, steps: int) -> float:
    """Share of the largest learning rate: linear warm-up, then linear down to a hundredth."""
    return min((step + 1) / WARMUP, 1 - 0.99 * step / steps)


def optimizers(model: LlamaForCausalLM, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon (https://kellerjordan.github.io/posts/muon/) for the matrices of the layers, AdamW for the rest."""
    named = dict(model.named_parameters())
    matrices = [p for name, p in named.items() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in named.items() if p.ndim != 2 or "embed" in name]
    muon = torch.optim.Muon(matrices, lr=args.muon_rate, weight_decay=args.weight_decay)
    return [muon, torch.optim.AdamW(others, lr=args.rate, betas=(0.9, 0.95), weight_decay=args.weight_decay)]


def step_all(model: LlamaForCausalLM, chosen: list[torch.optim.Optimizer], batch: torch.Tensor, share: float) -> float:
    """One step of every optimizer at `share` of its largest rate; the loss of `batch` in nats per token."""
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in chosen:
        for group in optimizer.param_groups:
            group["lr"] = optimizer.defaults["lr"] * share
        optimizer.step()
        optimizer.zero_grad()
    return float(loss.detach())


def train(model: LlamaForCausalLM, row: torch.Tensor, kept: torch.Tensor, args: argparse.Namespace) -> None:
    """Minimise the next-token loss on `row`; print it, and that on the `kept` text, now and then."""
    chosen = optimizers(model, args)
    started, recent = time.perf_counter(), []
    for step, batch in enumerate(batches(row, args.steps, args.seed)):
        recent.append(step_all(model, chosen, batch, rate(step, args.steps)))
        if (step + 1) % 200 == 0 or step + 1 == args.steps:
            print(
                f"step {step + 1:5d} of {args.steps}  train {sum(recent) / len(recent):.3f}  "
                f"kept {loss_on(model, kept):.3f}  {time.perf_counter() - started:6.0f} s",
                flush=True,
            )
            recent.clear()


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write both in the layout that `from_pretrained` reads, the weights in half precision."""
    folder.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for path in folder.iterdir():
        path.chmod(0o644)


def describe(folder: Path, args: argparse.Namespace, figures: dict[str, float]) -> None:
    """Write the README of the model folder."""
    words = figures | {"python": platform.python_version(), "torch": torch.__version__.split("+")[0], **vars(args)}
    (folder / "README.md").write_text(README.format(**words), encoding="utf-8")


README = """\
# The embedded base model

A small Llama (hidden {hidden}, {layers} layers, {heads} heads, {vocabulary} tokens of byte-level BPE,
{positions} positions, tied embeddings, {parameters:,} parameters in half precision), so that federated tuning can be
tried anywhere without a download. It is a base to tune, not a model to rely on.

- Text: docstrings and comments of the Python {python} standard library and its tests ({characters:,} characters),
  without the modules and the language reference that `ciphertune.lm.embedded.tuning_topics` gives to clients.
- Made by `python scripts/make_base_model.py --steps {steps} --seed {seed} --threads {threads}` in {minutes:.0f} minutes
  on a CPU, with torch {torch}.
- Loss in nats per token, in pieces of 128: {kept:.2f} on pretraining text kept aside, {tuning:.2f} on the held-out
  passages of four tuning topics ({uniform:.2f} is guessing).

Licence: the text is part of Python and under the PSF licence, version 2; the weights and the tokenizer are Apache-2.0.
"""


def arguments() -> argparse.Namespace:
    """The command line."""
    root = Path(__file__).resolve().parents[1]
    parser = argparse.ArgumentParser(description="make the embedded base model")
    parser.add_argument("--out", type=Path, default=root / "src" / "ciphertune" / "assets" / "base")
    parser.add_argument("--steps", type=int, default=2200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; more are slower on a busy machine")
    parser.add_argument("--rate", type=float, default=3e-3, help="largest learning rate of AdamW")
    parser.add_argument("--muon-rate", type=float, default=0.02, help="largest learning rate of Muon")
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--hidden", type=int, default=160)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=5)
    return parser.parse_args()


def main() -> None:
    """Text, tokenizer, model, training, files, check."""
    args = arguments()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    started = time.perf_counter()
    texts = list(pretraining_text())
    tokenizer = make_tokenizer(texts)
    row = encode(tokenizer, [text for i, text in enumerate(texts) if i % 40])
    kept = encode(tokenizer, texts[::40])
    model = make_model(args.hidden, args.layers, args.heads)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{len(texts)} texts, {len(row)} tokens and {len(kept)} kept aside, {parameters} parameters", flush=True)
    train(model, row, kept, args)
    before = loss_on(model, kept)
    save(model, tokenizer, args.out)
    again = LlamaForCausalLM.from_pretrained(args.out, dtype=torch.float32)
    tuning = encode(tokenizer, [passage for topic in tuning_topics() for passage in topic.heldout])
    figures = {
        "kept": loss_on(again, kept),
        "tuning": loss_on(again, tuning),
        "uniform": math.log(VOCABULARY),
        "minutes": (time.perf_counter() - started) / 60,
        "parameters": parameters,
        "characters": sum(map(len, texts)),
        "vocabulary": VOCABULARY,
        "positions": POSITIONS,
    }
    describe(args.out, args, figures)
    size = sum(path.stat().st_size for path in args.out.iterdir())
    print(json.dumps(figures | {"kept_before_half_precision": before, "bytes": size}, indent=1))


if __name__ == "__main__":
    main()
