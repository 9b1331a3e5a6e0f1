"""The engine's own process, and the client that talks to it: msgspec (msgpack) over ZeroMQ Unix sockets."""
