"""The exceptions of moshi_c. A message is one sentence: what, what was found, what was expected."""


class MoshiError(Exception):
    """Base of every error this package raises on its own account."""


class CheckpointError(MoshiError, ValueError):
    """A weight file, config or tokenizer is missing, damaged or of the wrong shape."""


class DeviceError(MoshiError, RuntimeError):
    """The machine cannot do it: no such device, not enough memory."""


class AudioError(MoshiError, ValueError):
    """Samples or codes of the wrong length, type, rate or value."""


class SessionError(MoshiError, RuntimeError):
    """A session in the wrong state: in use by another thread, closed, or no slot free."""
