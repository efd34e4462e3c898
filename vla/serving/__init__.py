"""A policy at the end of a socket, for robots (openpi's client protocol) and for vla-eval's benchmarks."""
