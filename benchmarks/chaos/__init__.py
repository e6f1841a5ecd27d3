"""Faults in a live cluster of real engines under load, one for each line of the failure contract."""
