"""The one error that every wrong data setting raises."""


class DataError(ValueError):
    """A data setting cannot work; the message names it, its value, and what would work."""
