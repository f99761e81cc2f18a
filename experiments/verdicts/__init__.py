"""Trials of the mathematical verifier: changed and rewritten golds, and the judges."""
