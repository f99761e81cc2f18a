"""Training on the devices: rows laid out by a plan, their log-probs, the optimizer step."""
