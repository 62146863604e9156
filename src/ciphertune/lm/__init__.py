"""Language models: everything that touches torch, transformers, peft and datasets."""
