"""Rows on the devices: how responses lie in them, their log-probs, and the optimizer step."""
