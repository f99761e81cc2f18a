"""Ports of the models, each with a config reader and a weight table."""
