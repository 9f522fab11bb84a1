"""What became of a fleet: results read back, grouped over seeds, compared, as tables, figures and pages.

Nothing here trains or changes results.
"""
