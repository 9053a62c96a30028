"""The engine in other people's loops: `integrations.transformers`, `.accelerate` and `.lightning`, each by itself."""
