"""The library's exceptions: one root class, and one subclass per kind of cause."""

__all__ = ["BGDError", "CalibrationError", "CheckpointError", "ConfigError", "DistributedError", "TraceError"]


class BGDError(Exception):
    """Root of all errors that a user can cause; the message names the layer, what was found, and what to do."""


class ConfigError(BGDError, ValueError):
    """A setting is invalid, or does not suit the network."""


class TraceError(BGDError):
    """The network cannot be traced into a graph.

    Attributes:
        reason: the message without advice, to be quoted in another one.
    """

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason or message


class CalibrationError(BGDError):
    """The calibration data, or the network's values on it, cannot be used."""


class DistributedError(BGDError):
    """Another process of the job stopped; the message names it."""


class CheckpointError(BGDError):
    """A file is damaged, of another format, newer than this library, or belongs to another network."""
