"""URDF bytes into a tree of elements, safely: no DTD, no entities, no network, bounded size, depth and time.

Namespaces are left alone: a URDF defines none, and real files use prefixes that they never declare (`sensor:camera`
in old Gazebo blocks). A prefixed element keeps its prefix in its tag and so is never mistaken for a URDF element.
"""

from __future__ import annotations

import io
import re
from xml.etree.ElementTree import Element, TreeBuilder
from xml.sax import SAXException
from xml.sax.handler import ContentHandler
from xml.sax.xmlreader import AttributesImpl, InputSource

from jidm.errors import UrdfError

MAX_BYTES = 16 * 2**20
"""Larger files are refused; the largest real robots stay under one MiB."""
MAX_ELEMENTS = 500_000
"""A tree of this many elements takes about 200 MiB; real robots have a few thousand."""
MAX_DEPTH = 100
"""Elements of a URDF nest six deep, sensor plugins in <gazebo> some more."""

_CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_MAX_MESSAGE_LENGTH = 600


def parse_xml(text: str | bytes, where: str) -> Element:
    """The <robot> element of URDF text.

    Raises:
        UrdfError: too large, empty, a DTD or entities, not well-formed, or not a <robot>.
    """
    from defusedxml import DefusedXmlException
    from defusedxml.expatreader import DefusedExpatParser

    source = InputSource()
    try:
        if isinstance(text, str):
            source.setEncoding("utf-8")  # whatever its declaration says, it is decoded already
            text = text.encode("utf-8")
        check_size(len(text), where)
        if not text.strip():
            raise UrdfError(f"{where}: the file is empty; was it written completely?")
        source.setByteStream(io.BytesIO(text))
        parser, tree = DefusedExpatParser(forbid_dtd=True), _TreeHandler(where)
        parser.setContentHandler(tree)
        parser.parse(source)
    except UrdfError:
        raise
    except DefusedXmlException:
        raise UrdfError(f"{where}: holds a DTD or entities, which a URDF never needs; remove the DOCTYPE") from None
    except (SAXException, ValueError, LookupError) as error:
        line = error.getLineNumber() if hasattr(error, "getLineNumber") else None
        reason = str(error.getMessage() if isinstance(error, SAXException) else error)
        at = "" if line is None else f" in line {line}"
        raise UrdfError(
            f"{where}: not well-formed XML{at} ({one_line(reason)}); is the file cut off or damaged? write it again"
        ) from None
    root = tree.robot()
    if root.tag != "robot":
        raise UrdfError(
            f"{where}: the outermost element is <{one_line(root.tag)}>; a URDF's is <robot>. Is it an SDF or MJCF file?"
        )
    return root


def check_size(size: int, where: str) -> None:
    """Refuse more than MAX_BYTES."""
    if size > MAX_BYTES:
        raise UrdfError(f"{where}: larger than {MAX_BYTES // 2**20} MiB; a URDF holds no mesh data, check the file")


def one_line(message: str) -> str:
    """The message without line breaks and control characters (names may hold them), shortened in the middle."""
    if len(message) > _MAX_MESSAGE_LENGTH:
        message = f"{message[: _MAX_MESSAGE_LENGTH // 2]} ... {message[-_MAX_MESSAGE_LENGTH // 2 :]}"
    return _CONTROL_CHARACTERS.sub(lambda c: ascii(c[0])[1:-1], message)


class _TreeHandler(ContentHandler):
    """Builds the tree, counting; text between tags means nothing in a URDF and is not kept."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self._where, self._builder = where, TreeBuilder()
        self._depth = self._count = 0

    def startElement(self, name: str, attrs: AttributesImpl) -> None:
        self._depth += 1
        self._count += 1
        if self._depth > MAX_DEPTH or self._count > MAX_ELEMENTS:
            much = f"{MAX_DEPTH} levels" if self._depth > MAX_DEPTH else f"{MAX_ELEMENTS} elements"
            raise UrdfError(f"{self._where}: holds more than {much} of XML; no robot needs that, check the file")
        self._builder.start(name, dict(attrs.items()))

    def endElement(self, name: str) -> None:
        self._depth -= 1
        self._builder.end(name)

    def robot(self) -> Element:
        return self._builder.close()
