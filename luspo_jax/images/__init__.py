"""Images: from stored bytes to patches in the slots of the vision tower.

This file imports nothing, so that a worker process starts with only what it needs.
"""
