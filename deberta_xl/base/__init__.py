"""What every other room stands on: errors, logging, launching and ending, files that are whole; the standard
library, pydantic and rich, and no torch.
"""
