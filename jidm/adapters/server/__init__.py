"""jidm over a websocket: openpi's protocol, LingBot-VA's messages."""

from jidm.adapters.server.client import Client, ServerError
from jidm.adapters.server.codec import MessageLimits, pack, unpack
from jidm.adapters.server.contract import Handshake
from jidm.adapters.server.server import PolicyServer
from jidm.adapters.server.session import Session

__all__ = ["Client", "Handshake", "MessageLimits", "PolicyServer", "ServerError", "Session", "pack", "unpack"]
