"""Runs that differ in a few fields: their definition, execution and comparison."""
