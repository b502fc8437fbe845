"""Measures the ops: time, memory and error of every backend, beside what else does the same (`ssl-ib-bench`)."""
