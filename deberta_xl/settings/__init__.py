"""What a user can choose, strict and with its meaning: the architecture, a run, the DeepSpeed JSON, and the
files that these are read from.
"""
