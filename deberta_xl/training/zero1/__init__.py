"""ZeRO-1 on float32 sums of gradients: when they are reduced, and the update of a rank's part of the weights."""
