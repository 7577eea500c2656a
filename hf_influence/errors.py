"""What can go wrong, by kind. Every message says what was found, why it matters and what to do."""


class InfluenceError(Exception):
    """Base of every error that this library raises on purpose."""


class BadSetting(InfluenceError, ValueError):
    """A setting, or a combination of settings, that cannot work."""


class UnknownMethod(BadSetting):
    """A method name that is not in the table."""


class UnsupportedModel(InfluenceError):
    """The model has trainable parameters, or a head, for which no exact per-example gradient is known."""


class BadExample(InfluenceError, ValueError):
    """A dataset, or one example of it, that has no usable gradient (empty, NaN loss, wrong columns)."""


class NotConverged(InfluenceError, ArithmeticError):
    """An iteration that grew instead of settling, or did not settle within its limit; its result is not handed out."""


class MissingPackage(InfluenceError, ImportError):
    """An optional package that is asked for and is not installed."""


class StoreError(InfluenceError):
    """A folder that is not a readable gradient store: missing, damaged, or written by a newer version."""


class StoreMismatch(StoreError):
    """A store of another model, adapter, dataset, task or compressor than the one at hand."""


class MissingRows(StoreError):
    """The store is fine but does not hold (all of) what was asked for."""
