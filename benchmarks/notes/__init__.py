"""Measurements behind single decisions, a script each; `benchmarks/NOTES.md` has what they said and when."""
