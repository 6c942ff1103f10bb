"""The exceptions of the library: one root, one subclass for each kind of cause."""

__all__ = ["BGDError", "CalibrationError", "CheckpointError", "ConfigError", "DistributedError", "TraceError"]


class BGDError(Exception):
    """Root of every error that a user of the library can cause; the message says what was found and what to do."""


class ConfigError(BGDError, ValueError):
    """A setting that is wrong in itself, or that does not suit the network it is applied to."""


class TraceError(BGDError):
    """The network cannot be turned into a graph."""


class CalibrationError(BGDError):
    """The calibration data, or what the network makes of it, cannot be used."""


class DistributedError(BGDError):
    """Another process of the same job has stopped; the message names it."""


class CheckpointError(BGDError):
    """A file that is damaged, foreign, newer than this library, or of another network."""
