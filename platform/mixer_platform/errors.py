"""Errors a person can act on: one sentence that names the thing, the place and the mend."""


class MixerError(Exception):
    """A job cannot go on; the message says what, where and how to mend it. Jobs exit with `exit_status`."""

    exit_status = 1

    def __init__(self, sentence: str) -> None:
        super().__init__(sentence)
        self.sentence = sentence

    def __str__(self) -> str:
        return self.sentence  # Ray Data adds advice about itself to the arguments of what it passes on


class ConfigError(MixerError):
    """A wrong key or value in a configuration."""

    exit_status = 2


class InputError(MixerError):
    """The input contract is broken: a missing folder, file or column, or a file that cannot be read."""


class StorageError(MixerError):
    """A workspace that cannot be read or written: no such bucket, no permission, no such key."""


class ConflictError(StorageError):
    """Somebody else published first; what they published is in use and untouched."""


class MissingError(StorageError):
    """What a key or a URI names is not there, or never can be; another try will not find it."""


class VersionError(MixerError):
    """Two derived things do not belong together, such as an index and a model that did not write it."""


class TrainingError(MixerError):
    """A model that learns no more, such as one whose loss is no number; what was written before is as it was."""


class DivergedError(TrainingError):
    """A step that no worker can take: all of them meet it at once, and would again."""


class WishError(MixerError):
    """No index reaches the recall, memory or latency that was asked for; nothing was published."""


def published_already(address: str) -> ConflictError:
    """Return the error of a run that came second."""
    return ConflictError(f"{address}: somebody else published first; theirs stands, run again to build on it")
