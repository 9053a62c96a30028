"""Tiny models, one function each, grouped by what they try; every file registers its own with `case`."""
