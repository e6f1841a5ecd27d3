"""One replica: what a step costs, how a batch is composed, how it is run."""
