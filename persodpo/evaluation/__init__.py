"""Results on held-out dialogues."""
