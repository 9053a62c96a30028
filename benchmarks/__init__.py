"""Benchmarks; a package of its own name, since others install one called so too."""
