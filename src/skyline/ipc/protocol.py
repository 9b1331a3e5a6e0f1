"""What both ends of the engine's sockets agree on."""

from __future__ import annotations

import msgspec

from skyline.engine.config import EngineConfig
from skyline.engine.messages import FromEngine, ToEngine

STATS_INTERVAL_S = 1.0


class Launch(msgspec.Struct):
    """The first line on the engine process's standard input, as JSON. When that input ends, its parent is gone."""

    config: EngineConfig
    requests_address: str  # the engine binds this and pulls from it
    outputs_address: str  # the client has bound this; the engine pushes to it


encoder = msgspec.msgpack.Encoder()
to_engine_decoder: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
from_engine_decoder: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)
