"""The OpenAI-compatible HTTP front end of one engine. Imports no torch."""

from skyline.server.app import create_app
from skyline.server.options import ServerOptions
from skyline.server.run import ServerStartError, run_server, serve

__all__ = ["ServerOptions", "ServerStartError", "create_app", "run_server", "serve"]
