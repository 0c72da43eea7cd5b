"""What people import, and what the tools do with a finished model."""
