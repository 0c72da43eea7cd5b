"""The model of the DeBERTa papers in plain PyTorch; it knows nothing of ranks, files or engines."""
