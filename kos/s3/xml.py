"""The XML that kos itself writes and reads: errors and requests of DeleteObjects.

Owns: their form, and a reader for XML from strangers. Does not own: listings and everything else that passes through.

Invariant: reading never expands, fetches or recurses: a document with a DTD is refused at its first mark, and size,
depth and number of elements and attributes are bounded before anything is built. And nobody can read another text into
what was read here: it is UTF-8, whatever a reader thinks of declared encodings.

Sources: https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html, API_DeleteObjects.html; XML 1.0 section
2.2 (characters that no document may hold).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final
from xml.parsers import expat

from kos.errors import S3Error

KEYS_MAX: Final = 1000
#: 1000 keys of 1024 bytes, each byte at most six characters (&quot;), and some 1300 for tags and version id: 7.5 MB.
DELETE_REQUEST_MAX_BYTES: Final = 8 * 1024 * 1024
_DEPTH_MAX: Final = 8
_ELEMENTS_MAX: Final = 20 * KEYS_MAX

# Not characters of XML 1.0, escaped or not; lone surrogates are what undecodable bytes became.
_NOT_XML: Final = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")
_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*", re.ASCII)
#: A tag with more than 16 attributes. The parser makes all of a tag's before anybody is asked: a million in 8 MB take
#: seconds and 200 MB. Linear, for no part of it is tried twice, and no tag and no value holds a "<".
_MANY_ATTRIBUTES: Final = re.compile(
    rb"""<[^<>"']*+(?:(?:"[^"<]*+"|'[^'<]*+')[^<>"']*+){17}""",
)
#: Other readers decode what XML lets them, or not: these two are the same for all.
_ENCODINGS: Final = frozenset({"utf-8", "us-ascii"})
_ESCAPES: Final = str.maketrans(
    # A reader turns a bare CR into LF, and a key may hold one.
    {"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "\r": "&#13;"}
)


def escape(text: str) -> str:
    """Text as XML character data; what XML cannot hold at all becomes U+FFFD."""
    return _NOT_XML.sub("\ufffd", text).translate(_ESCAPES)


def error_document(
    code: str, message: str, resource: str, request_id: str, extra: Mapping[str, str] | None = None
) -> bytes:
    """S3's error document. resource: the path asked for; extra: further elements by name."""
    elements = {"Code": code, "Message": message, **(extra or {}), "Resource": resource, "RequestId": request_id}
    assert all(_NAME.fullmatch(name) for name in elements), "element names are kos' own"
    body = "".join(f"<{name}>{escape(text)}</{name}>" for name, text in elements.items())
    return f'<?xml version="1.0" encoding="UTF-8"?>\n<Error>{body}</Error>'.encode()


class UnreadableXML(ValueError):
    """The document is no well-formed XML, or is more than the reader takes."""


@dataclass(slots=True)
class Element:
    """name: without namespace. text: its own character data, children's left out."""

    name: str
    text: str = ""
    children: list[Element] = field(default_factory=list)


class _Reader:
    """Builds Elements from expat's events within the bounds."""

    def __init__(self, elements_max: int) -> None:
        self.root: Element | None = None
        self._open: list[tuple[Element, list[str]]] = []
        self._elements = 0
        self._elements_max = elements_max

    def start(self, name: str, attributes: object) -> None:
        self._elements += 1
        if len(self._open) >= _DEPTH_MAX or self._elements > self._elements_max:
            raise UnreadableXML("too deep or too many elements")
        element = Element(name.rpartition(" ")[2])
        if self._open:
            self._open[-1][0].children.append(element)
        else:
            self.root = element
        self._open.append((element, []))

    def text(self, text: str) -> None:
        self._open[-1][1].append(text)

    def end(self, name: str) -> None:
        element, texts = self._open.pop()
        element.text = "".join(texts)

    def doctype(self, *declaration: object) -> None:
        raise UnreadableXML("a document type declaration is not allowed")

    def declaration(self, version: str, encoding: str | None, standalone: int) -> None:
        if encoding is not None and encoding.lower() not in _ENCODINGS:
            raise UnreadableXML("another encoding than UTF-8 is not allowed")


def read(document: bytes, max_bytes: int, elements_max: int = _ELEMENTS_MAX) -> Element:
    """The root of a document from a stranger; raises UnreadableXML. max_bytes bounds its size, elements_max what is
    built of it: an element takes some 300 bytes.

    Without a DTD there are no entities but XML's own five, so nothing can expand or be fetched.
    """
    if len(document) > max_bytes:
        raise UnreadableXML(f"more than {max_bytes} bytes")
    if b"\0" in document:
        raise UnreadableXML("UTF-16 is not allowed")
    if _MANY_ATTRIBUTES.search(document):
        raise UnreadableXML("too many attributes")
    reader = _Reader(elements_max)
    parser = expat.ParserCreate(namespace_separator=" ")
    parser.buffer_text = True
    parser.StartElementHandler = reader.start
    parser.EndElementHandler = reader.end
    parser.CharacterDataHandler = reader.text
    parser.StartDoctypeDeclHandler = reader.doctype
    parser.XmlDeclHandler = reader.declaration
    try:
        # Some origins send blanks to keep a slow answer alive, before the declaration, where XML allows none.
        parser.Parse(document.lstrip(b" \t\r\n"), True)
    except (expat.ExpatError, LookupError, ValueError) as error:
        raise UnreadableXML(str(error)) from error
    if reader.root is None:
        raise UnreadableXML("no element")
    return reader.root


@dataclass(frozen=True, slots=True)
class DeleteItem:
    """One object to delete: the current one, or one version of it."""

    key: str
    version_id: str | None = None


@dataclass(frozen=True, slots=True)
class DeleteRequest:
    """A DeleteObjects request; quiet: its result names failures only."""

    items: tuple[DeleteItem, ...]
    quiet: bool


# Further elements that S3 defines for an object to delete; they are conditions, which the origin weighs.
_DELETE_CONDITIONS: Final = frozenset({"ETag", "LastModifiedTime", "Size"})


def parse_delete_request(document: bytes) -> DeleteRequest:
    """The keys of a DeleteObjects request; raises S3Error MalformedXML, also for none or more than 1000 of them."""
    try:
        root = read(document, DELETE_REQUEST_MAX_BYTES)
    except UnreadableXML as error:
        raise S3Error("MalformedXML") from error
    items: list[DeleteItem] = []
    quiet = False
    well_formed = root.name == "Delete"
    for child in root.children:
        if child.name == "Object":
            named = {part.name: part.text for part in child.children}
            key = named.get("Key")
            known = named.keys() - _DELETE_CONDITIONS <= {"Key", "VersionId"} and len(named) == len(child.children)
            # Of text around an element other readers take the first piece, or the last: another key.
            plain = not any(part.children for part in child.children)
            well_formed = well_formed and bool(key) and known and plain
            items.append(DeleteItem(key or "", named.get("VersionId") or None))
        elif child.name == "Quiet" and child.text.strip() in ("true", "false", "1", "0"):
            quiet = child.text.strip() in ("true", "1")
        else:
            well_formed = False
    if not well_formed or not 1 <= len(items) <= KEYS_MAX:
        raise S3Error("MalformedXML")
    return DeleteRequest(tuple(items), quiet)
