"""A language model that forgets: invented people and places, a small Transformer, its scores, methods and runs."""
