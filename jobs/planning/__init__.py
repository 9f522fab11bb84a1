"""What a fleet will do before it does it: what students cost, which share a cohort, and what cannot fit."""
