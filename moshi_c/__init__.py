"""moshi_c: full-duplex speech models of the Moshi family, on a core in C.

    import moshi_c

    model = moshi_c.load()                    # a small model that comes with the package
    session = moshi_c.Session(model, seed=7)
    for pcm in frames:                        # float32[1920] each, 80 ms of what the user says
        frame = session.step(pcm)             # 80 ms of what the model says back
        frame.pcm, frame.text

A model is shared by its sessions; a session is one conversation. Errors are children of MoshiError.
"""

from ._core import __version__
from .errors import AudioError, CheckpointError, DeviceError, MoshiError, SessionError
from .model import Device, Mimi, MimiStream, Model, devices, load, load_mimi
from .ogg_opus import OggOpusReader, OggOpusWriter
from .recording import Recording, Word
from .session import Frame, Session, step_many

__all__ = [
    "AudioError",
    "CheckpointError",
    "Device",
    "DeviceError",
    "Frame",
    "Mimi",
    "MimiStream",
    "Model",
    "MoshiError",
    "OggOpusReader",
    "OggOpusWriter",
    "Recording",
    "Session",
    "SessionError",
    "Word",
    "__version__",
    "devices",
    "load",
    "load_mimi",
    "step_many",
]
