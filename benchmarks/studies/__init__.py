"""Side studies of the benchmark: what each part adds, more replicas, a spike, and roles that change."""
