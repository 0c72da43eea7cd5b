"""Weights and training state on disk: names, files, verification, conversion. Safetensors only, no pickle."""
