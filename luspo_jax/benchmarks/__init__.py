"""Evaluation sets and their scorers, one module each. Nothing here imports jax."""
