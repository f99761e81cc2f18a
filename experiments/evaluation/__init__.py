"""Implementation of `python -m experiments.evaluate`: plan, policy, storage, tables, comparison."""
