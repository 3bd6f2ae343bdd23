"""The one error of everything about weights."""

from cassle_jax.checks import UserError


class WeightsError(UserError):
    """A file of weights cannot be read or does not fit; the message is the reason."""
