"""What plugin authors test their plugins with: any algorithm on raw tensors, conformance checks, and a tiny run."""

from kdflow.testing.conformance import check_algorithm, check_divergence
from kdflow.testing.raw import loss, side
from kdflow.testing.tiny import tiny_run

__all__ = ["check_algorithm", "check_divergence", "loss", "side", "tiny_run"]
