"""Rows: from any source to numbered rows in memory-mapped arrays, and the augmented views of them.

Nothing here knows of models or logits.
"""
