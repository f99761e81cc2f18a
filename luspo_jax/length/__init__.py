"""Instruments that measure response length, why it changes, and whether it improves accuracy."""
