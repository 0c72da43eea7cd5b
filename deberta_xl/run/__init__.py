"""A run seen from outside: its folder, its owner, its signs of life, what it tells and the pictures of it, where its
ranks meet, and the look at its nodes.
"""
