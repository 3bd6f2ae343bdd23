"""The error that reading and writing weights raises."""

from cassle_jax.checks import UserError


class WeightsError(UserError):
    """A file of weights cannot be read or does not fit; the message is the reason."""
