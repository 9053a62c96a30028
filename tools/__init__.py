"""What a release is checked with: wheels, the oldest Python and torch, and a script as a user writes it."""
