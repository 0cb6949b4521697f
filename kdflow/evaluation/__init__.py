"""Held-out divergence and generation."""
