"""Every error this package raises on purpose derives from BsfaError."""


class BsfaError(Exception):
    """Base class: the message says what was wrong, what was given, what is wanted, what to do."""


class InputError(BsfaError, ValueError):
    """An argument has a wrong shape, dtype, device or value."""


class UnsupportedError(BsfaError, RuntimeError):
    """`strict=True` and at least one attention site must stay dense; lists every reason."""


class CalibrationError(BsfaError, RuntimeError):
    """Calibration saw no attention, no data, or was asked for a target it cannot solve."""


class ThresholdsError(BsfaError, ValueError):
    """A thresholds file is corrupted, foreign, or does not fit the model."""


class ModelUnavailableError(BsfaError, RuntimeError):
    """A command's model is not installed, not there, or not the file that was pinned."""
