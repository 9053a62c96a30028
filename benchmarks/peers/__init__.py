"""The same OrthoGrad step by every way that people have, side by side; see `benchmarks.peers.run`."""
