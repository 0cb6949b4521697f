"""Evaluators, which count right answers, and the held-out figures: divergence, cross-entropy and agreement."""
