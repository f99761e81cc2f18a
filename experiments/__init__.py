"""Launchers, sweeps, benches and studies around `luspo_jax`."""
