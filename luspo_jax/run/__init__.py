"""A run from its configuration to its folder: fields, checks, what they build, and what is kept."""
