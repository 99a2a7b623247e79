"""Companion to PersoDPO: persona-grounded preference pairs without annotation, and DPO on them."""
