"""A run that Ray draws on many machines: the driver's loop, the worker, the nodes, and what goes between them."""
