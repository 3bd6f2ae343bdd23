"""The one error of everything about weights."""


class WeightsError(ValueError):
    """A file of weights cannot be read or does not fit; the message is one line, the reason."""
