"""Prepare: logs, queries and items become weakly labelled samples; what cannot be used goes to quarantine."""
