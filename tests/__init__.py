"""Tests; `fleets` holds the small recipes that they share."""
