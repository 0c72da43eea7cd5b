"""What is fine-tuned on: the files of tasks as examples, their labels, features, predictions, metrics and
submissions.
"""
