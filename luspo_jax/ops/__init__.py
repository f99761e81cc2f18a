"""Kernels with several implementations, chosen by platform."""
