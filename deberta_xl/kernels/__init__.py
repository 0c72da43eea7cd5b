"""How disentangled attention is computed: the contract, the registry of what can be chosen, and a file each."""
