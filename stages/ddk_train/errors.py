"""What can go wrong during a run that is not a mistake in its configuration."""


class TrainingError(RuntimeError):
    """The run cannot go on; the message says why, and from where it can be resumed."""
