"""Instruments that say how long responses are, why, and whether the length is worth it."""
