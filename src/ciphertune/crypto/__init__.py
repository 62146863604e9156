"""Encryption: knows numbers and keys, not models."""
