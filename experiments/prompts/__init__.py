"""Prompts of a configuration as the model will see them, for `experiments.preview`."""
