"""Faults that are injected into runs, at points drawn from a seed; `scripts/reliability.py` goes through them."""
