"""The one error that every wrong data setting raises."""

from cassle_jax.checks import UserError


class DataError(UserError):
    """A data setting cannot work; the message names it, its value, and what would work."""
