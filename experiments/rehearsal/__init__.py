"""A run rehearsed without its hardware: every program compiled for the target, and its costs."""
