"""The training run: engine, optimizer, one loop, its state, and what ends it."""
