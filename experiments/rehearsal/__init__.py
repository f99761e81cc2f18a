"""Rehearses a run without its hardware: compiles every program for the target, and counts costs."""
