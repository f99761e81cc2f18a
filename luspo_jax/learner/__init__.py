"""Training on the devices: rows that a plan lays, their log-probs, the optimizer step."""
