"""The XML that kos writes and reads, from friends and strangers."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from kos.errors import S3Error
from kos.s3 import xml

NS = 'xmlns="http://s3.amazonaws.com/doc/2006-03-01/"'


def test_an_error_document() -> None:
    document = xml.error_document(
        "InvalidRange", "The requested range is not satisfiable", "/b/k", "RID", {"ActualObjectSize": "10"}
    )
    assert document == (
        b'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>InvalidRange</Code>'
        b"<Message>The requested range is not satisfiable</Message><ActualObjectSize>10</ActualObjectSize>"
        b"<Resource>/b/k</Resource><RequestId>RID</RequestId></Error>"
    )


def test_an_error_document_holds_any_text() -> None:
    resource = "/b/<&>\"'\r\n\t\x00\x1f\ud800\ufffe é"
    root = ET.fromstring(xml.error_document("NoSuchKey", "m", resource, "RID"))
    assert root.findtext("Resource") == "/b/<&>\"'\r\n\t\ufffd\ufffd\ufffd\ufffd é"


def delete(objects: str, rest: str = "", attributes: str = NS) -> bytes:
    return f'<?xml version="1.0" encoding="UTF-8"?><Delete {attributes}>{objects}{rest}</Delete>'.encode()


def test_a_delete_request() -> None:
    document = delete(
        "<Object><Key>a b+é&amp;&#13;\n </Key></Object>"
        "<Object><Key>c</Key><VersionId>v1</VersionId><ETag>x</ETag></Object>\n <!-- a remark -->",
        "<Quiet>true</Quiet>",
    )
    assert xml.parse_delete_request(document) == xml.DeleteRequest(
        (xml.DeleteItem("a b+é&\r\n "), xml.DeleteItem("c", "v1")), quiet=True
    )
    assert xml.parse_delete_request(delete("<Object><Key>a</Key></Object>", attributes="")).quiet is False
    prefixed = b'<s:Delete xmlns:s="urn:x"><s:Object><s:Key>a</s:Key></s:Object></s:Delete>'
    assert xml.parse_delete_request(prefixed).items == (xml.DeleteItem("a"),)
    assert xml.parse_delete_request(delete("<Object><Key>é</Key></Object>").decode().encode("utf-8-sig")).items


def test_a_thousand_keys_and_one_more() -> None:
    one = f"<Object><Key>{'&quot;' * 1024}</Key></Object>"
    assert len(xml.parse_delete_request(delete(one * 1000)).items) == 1000
    with pytest.raises(S3Error, match="MalformedXML"):
        xml.parse_delete_request(delete("<Object><Key>k</Key></Object>" * 1001))


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"not xml",
        b"<Delete>",
        b"<Delete/>",
        b"<Other><Object><Key>a</Key></Object></Other>",
        delete("<Object/>"),
        delete("<Object><Key></Key></Object>"),
        delete("<Object><VersionId>1</VersionId></Object>"),
        delete("<Object><Key>a</Key><Key>b</Key></Object>"),
        delete("<Object><Key>a</Key><What/></Object>"),
        delete("<Object><Key>a<b/>c</Key></Object>"),
        delete("<Object><Key>a<Key>b</Key></Key></Object>"),
        delete("<Object><Key>a</Key></Object>", "<Quiet>maybe</Quiet>"),
        delete("<Object><Key>a</Key></Object>", "<Other/>"),
        delete("<Object><Key>a</Key></Object>") + b"<More/>",
        delete("<Object><Key>&#0;</Key></Object>"),
        delete("<Object><Key>\ufffe</Key></Object>"),
        b"<Delete><Object><Key>\xff</Key></Object></Delete>",
        b'<?xml version="1.0" encoding="nonsense"?><Delete><Object><Key>a</Key></Object></Delete>',
        b'<?xml version="1.0" encoding="utf-7"?><Delete><Object><Key>a</Key></Object></Delete>',
        # Who does not heed the encoding would delete another key than the one that was read here.
        '<?xml version="1.0" encoding="iso-8859-1"?><Delete><Object><Key>é</Key></Object></Delete>'.encode(),
        '<?xml version="1.0" encoding="utf-16"?><Delete><Object><Key>a</Key></Object></Delete>'.encode("utf-16"),
        "<Delete><Object><Key>a</Key></Object></Delete>".encode("utf-16-le"),
    ],
)
def test_a_delete_request_that_is_none(document: bytes) -> None:
    with pytest.raises(S3Error, match="MalformedXML"):
        xml.parse_delete_request(document)


BILLION_LAUGHS = (
    b'<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa">'
    + b"".join(
        b'<!ENTITY %s "%s">' % (bytes([letter + 1]), b"&%s;" % bytes([letter]) * 10)
        for letter in range(ord("a"), ord("i"))
    )
    + b"]><Delete><Object><Key>&i;</Key></Object></Delete>"
)
EXTERNAL = b'<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]><Delete><Object><Key>&a;</Key></Object></Delete>'


@pytest.mark.parametrize(
    "document",
    [
        BILLION_LAUGHS,
        EXTERNAL,
        b'<!DOCTYPE Delete SYSTEM "http://127.0.0.1/x.dtd"><Delete/>',
        b"<!DOCTYPE Delete><Delete><Object><Key>a</Key></Object></Delete>",
        b"<Delete><Object><Key>&a;</Key></Object></Delete>",
        b"<Delete>" + b"<Object>" * 100_000,
        b"<Delete>" + b"<Object/>" * 100_000 + b"</Delete>",
        b"<Delete><Object><Key>" + b"k" * xml.DELETE_REQUEST_MAX_BYTES + b"</Key></Object></Delete>",
        b"<Delete" + b"".join(b" a%d='>'" % n for n in range(17)) + b"><Object><Key>a</Key></Object></Delete>",
        b"<Delete" + b"".join(b' xmlns:a%d = "u"' % n for n in range(17)) + b"><Object><Key>a</Key></Object></Delete>",
        b"<Delete><Object><Key " + b" ".join(b"a%d='u'" % n for n in range(500_000)) + b">a</Key></Object></Delete>",
    ],
    ids=["laughs", "external", "dtd", "doctype", "entity", "deep", "many", "large", "attrs", "xmlns", "attributes"],
)
def test_hostile_documents_are_refused(document: bytes) -> None:
    with pytest.raises(S3Error, match="MalformedXML"):
        xml.parse_delete_request(document)


def test_what_looks_like_attributes_is_none() -> None:
    key = "a='b' " * 100 + '"' * 99
    assert xml.parse_delete_request(delete(f"<Object><Key>{key}</Key></Object>")).items == (xml.DeleteItem(key),)
    sixteen = " ".join(f"a{n}='>'" for n in range(15))
    assert xml.parse_delete_request(delete("<Object><Key>k</Key></Object>", attributes=f"{NS} {sixteen}")).items
    for encoding in ("utf-8", "UTF-8", "us-ascii"):
        document = f'<?xml version="1.0" encoding="{encoding}"?><Delete><Object><Key>k</Key></Object></Delete>'
        assert xml.parse_delete_request(document.encode()).items
