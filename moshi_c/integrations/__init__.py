"""Moshi inside agent frameworks, in their process: `pipecat`, `livekit` and `fastrtc`.

Each module needs its framework, which is imported with the module and at no other time; what they
share is in `conversation`, which needs none.
"""
