"""The tools beside us: their environment, an adapter each, what bench_peers and traps share."""
