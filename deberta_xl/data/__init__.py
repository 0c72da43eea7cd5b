"""From text on disk to masked batches: numpy and SentencePiece, no torch; ranks are plain integers here."""
