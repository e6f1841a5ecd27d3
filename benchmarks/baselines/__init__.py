"""What people would use instead: one file each, all stepped by the same virtual engine."""
