"""Do token-level ratios break on a mixture of experts where sequence-level ones hold?"""
