"""A run seen from outside: its folder, its owner, its signs of life and what it tells, where its ranks meet, and
the look at its nodes.
"""
