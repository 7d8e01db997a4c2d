"""What can go wrong, as exceptions that say what happened, where, and what to do about it."""

from __future__ import annotations


class ZQError(Exception):
    """Base of every error this package raises on purpose.

    Args:
        what: the problem, in one sentence.
        where: dotted name of the layer, graph value or file concerned.
        fix: what the caller can do about it.

    >>> print(ZQError("weight contains NaN", where="encoder.layer.0.output.dense", fix="re-export the checkpoint"))
    encoder.layer.0.output.dense: weight contains NaN. To mend it: re-export the checkpoint.
    """

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None) -> None:
        self.what, self.where, self.fix = what, where, fix
        message = f"{where}: {what}" if where else what
        if fix:
            message = f"{message.rstrip('.')}. To mend it: {fix.rstrip('.')}."
        super().__init__(message)


class RecipeError(ZQError, ValueError):
    """A recipe, rule, scheme or option that does not make sense."""


class CaptureError(ZQError):
    """The model cannot be turned into a Program."""


class CalibrationError(ZQError):
    """Calibration data is missing, malformed or belongs to another model."""


class WeightError(ZQError):
    """A weight cannot be quantized (NaN, Inf) or is no longer what it was at compile time."""


class VerificationError(ZQError):
    """A pass produced a graph that is illegal at its stage or breaks its numerics contract."""


class StrictError(ZQError):
    """`strict=True` and something the recipe names was not quantized."""


class KernelBuildError(ZQError):
    """A native kernel could not be compiled or loaded."""


class ExportError(ZQError):
    """A Program cannot be lowered to the requested target."""


class LintError(ZQError):
    """An ONNX file cannot be linted: it cannot be read, or the target is unknown."""
