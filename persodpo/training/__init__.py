"""Grouped, prefix-shared, score-weighted DPO."""
