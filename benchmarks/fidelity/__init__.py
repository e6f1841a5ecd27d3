"""Whether the simulator is to be believed: the same requests on a real node and on its simulated twin."""
