"""Ports of the models, each with its config reader and its weight table."""
