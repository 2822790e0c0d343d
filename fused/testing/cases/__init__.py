"""The one list of cases of each op, for tests, gradient checks and benchmarks alike."""
