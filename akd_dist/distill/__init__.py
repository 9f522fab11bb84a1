"""The work itself: a teacher's logits, the stream of batches, objectives, and students that learn from them.

All of it are plain functions of one process; `jobs` runs many of them on Ray.
"""
