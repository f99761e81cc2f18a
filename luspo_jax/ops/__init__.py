"""Kernels that have several implementations, chosen by platform."""
