"""How disentangled attention is computed: so far one way, `reference`."""
