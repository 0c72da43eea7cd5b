"""How disentangled attention is computed: so far one way, `reference`, whose signature a faster one would have."""
