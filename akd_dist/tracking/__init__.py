"""How far a run is: small files that workers leave, read by whoever wants to see.

Progress, `status` and trackers are here; results and pages are in `report`.
"""
