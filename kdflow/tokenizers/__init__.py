"""Real tokenizers as byte strings, vocabulary overlap, aligners."""
