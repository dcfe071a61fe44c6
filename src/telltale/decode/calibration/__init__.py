"""Calibration of step verification: labelled trials, risk control, thresholds with a promise, and the report."""
