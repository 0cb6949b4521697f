"""What plugin authors test their plugins with: any algorithm on raw tensors, and conformance checks."""

from kdflow.testing.conformance import check_algorithm, check_divergence
from kdflow.testing.raw import loss, side

__all__ = ["check_algorithm", "check_divergence", "loss", "side"]
