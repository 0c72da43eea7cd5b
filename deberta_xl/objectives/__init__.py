"""What is learned: an objective's model, batches, losses, evaluation and pictures. None of it knows the loop."""
