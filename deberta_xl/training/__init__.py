"""The training run: engine, optimizer, loop, metrics, evaluation."""
