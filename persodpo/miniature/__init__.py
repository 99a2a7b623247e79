"""The whole method in small: a generated world of dialogues, and models that are trained on the spot."""
