"""Models on disk: our own folders, the original release's and Hugging Face's, and what their names and fields
mean for us.
"""
