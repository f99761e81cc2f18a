"""Supervised fine-tuning: its configuration, data, loop and results."""
