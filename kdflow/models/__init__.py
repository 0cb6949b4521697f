"""Hugging Face models: fetched, loaded, cut in depth, packed attention, their head read and probed."""
