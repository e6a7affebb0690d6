"""The name by which `sa_lens.shipped.make` imports `text_of_run`."""

from sa_lens.training.trained_run import text_of_run

__all__ = ["text_of_run"]
