"""Tiny models and data files for tests: random weights, a tokenizer trained on a few sentences."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

transformers_logging.disable_progress_bar()
torch.set_num_threads(1)  # two spinning threads on a busy machine are a hundred times slower than one

SENTENCES = (
    "the laboratory keeps its records under lock and key",
    "a key that nobody shares opens nothing for anybody",
    "the nurse wrote the dose on the chart before the shift ended",
    "seven samples were warm and one of them was spoiled",
    "every morning the courier brings a sealed box of notes",
    "nobody reads the notes until all of them have come",
    "the sum of the notes says more than any single one",
    "rain fell on the roof of the old library all night",
)


def write_lines(path: Path, rows: Iterable[Any]) -> Path:
    """`rows` as JSON lines in `path`."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def tiny_tokenizer(kind: str = "llama", vocabulary: int = 300) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer. llama: <s> text, </s> known; bert: [CLS] text [SEP]."""
    special = ["<pad>", "<s>", "</s>"] if kind == "llama" else ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    if kind == "llama":
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    else:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
        )
        names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **names)


def tiny_llama(folder: Path, *, hidden: int = 32, layers: int = 2, seed: int = 0, padding: int | None = 0) -> Path:
    """A Llama folder: 2 layers of 32, 4 heads over 2 key-value heads (so k_proj is 16 x 32), 300 tokens."""
    tokenizer = tiny_tokenizer("llama")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=padding,
        bos_token_id=1,
        eos_token_id=2,
    )
    return _save(LlamaForCausalLM, config, tokenizer, folder, seed)


def tiny_bert(folder: Path, *, hidden: int = 32, layers: int = 2, seed: int = 0, pooler: bool = True) -> Path:
    """A BERT encoder folder without a classification head, and without its pooler when asked."""
    tokenizer = tiny_tokenizer("bert")
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )

    def build(config: BertConfig) -> BertModel:
        return BertModel(config, add_pooling_layer=pooler)

    return _save(build, config, tokenizer, folder, seed)


def tiny_classifier(folder: Path, labels: int = 2, seed: int = 0) -> Path:
    """A BERT folder that already has a head of `labels` classes."""
    tiny_bert(folder, seed=seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed + 1)
        model = BertForSequenceClassification.from_pretrained(folder, num_labels=labels)
    model.save_pretrained(folder)
    return folder


def _save(build: Any, config: Any, tokenizer: PreTrainedTokenizerFast, folder: Path, seed: int) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel = build(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
