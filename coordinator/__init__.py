"""Decides: admission, placement, pools; and the ways in, the endpoint and the command line."""
