"""What no scheduler can do better, on the same arrivals: requests served, and rates at which enough are."""
