"""Ways to compute disentangled attention; all have the signature of `reference.disentangled_attention`."""
