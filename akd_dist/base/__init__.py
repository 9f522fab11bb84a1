"""What every other room stands on: errors, files that are whole or absent, places, text for people.

Nothing here knows of stores, recipes or models.
"""
