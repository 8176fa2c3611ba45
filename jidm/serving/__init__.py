"""jidm over a websocket: openpi's protocol, LingBot-VA's messages."""

from jidm.serving.client import Client, ServerError
from jidm.serving.codec import MessageLimits, pack, unpack
from jidm.serving.handshake import Handshake
from jidm.serving.server import PolicyServer
from jidm.serving.session import Session

__all__ = ["Client", "Handshake", "MessageLimits", "PolicyServer", "ServerError", "Session", "pack", "unpack"]
