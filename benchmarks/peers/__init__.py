"""Programs of others that the benchmarks are compared with: a script each, and where needed an environment of its own."""
