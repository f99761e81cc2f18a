"""From prompts to batches: groups of responses are sampled, rewarded, filtered and measured."""
