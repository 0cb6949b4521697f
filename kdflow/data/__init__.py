"""Data: records → samples → pairs of token sequences → packed batches under a token budget."""
