"""A discrete-event simulator around the serving code: the same planner, placement and batch composition."""
