"""A run's state on disk: layout-free, atomic, verified; safetensors and JSON only."""
