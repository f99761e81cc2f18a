"""What `python -m experiments.evaluate` does: plan, policy, storage, tables, comparison."""
