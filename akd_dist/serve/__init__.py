"""Finished students at work: metrics on other data, predictions, exports."""
