"""Reinforcement learning with verifiable rewards that measures and controls response length."""
