"""XML from strangers and for them, generated."""

from __future__ import annotations

import contextlib

from hypothesis import given
from hypothesis import strategies as st

from kos.errors import S3Error
from kos.s3 import xml

# What XML 1.0 can hold; LF and TAB included, CR by its reference.
xml_text = st.text(st.characters(codec="utf-8", exclude_characters="\ufffe\uffff", exclude_categories=("Cc", "Cs")))
any_text = st.text(st.characters(), max_size=50)


@given(any_text, any_text)
def test_any_text_fits_into_an_error_document(message: str, resource: str) -> None:
    parsed = xml.read(xml.error_document("Code", message, resource, "R"), 64 * 1024)
    texts = {child.name: child.text for child in parsed.children}
    assert (parsed.name, texts["Code"]) == ("Error", "Code")
    assert len(texts["Message"]) == len(message)


@given(
    st.lists(st.tuples(xml_text.filter(bool), st.one_of(st.none(), st.just("v1"))), min_size=1, max_size=20),
    st.booleans(),
)
def test_keys_come_back_as_they_were(items: list[tuple[str, str | None]], quiet: bool) -> None:
    objects = "".join(
        f"<Object><Key>{xml.escape(key)}</Key>{f'<VersionId>{version}</VersionId>' if version else ''}</Object>"
        for key, version in items
    )
    request = xml.parse_delete_request(f"<Delete>{objects}<Quiet>{str(quiet).lower()}</Quiet></Delete>".encode())
    assert [(item.key, item.version_id) for item in request.items] == items
    assert request.quiet is quiet


fragments = st.lists(
    st.sampled_from(
        [
            "<Delete>",
            "</Delete>",
            "<Object>",
            "</Object>",
            "<Key>",
            "</Key>",
            "<Error>",
            "</Error>",
            "a",
            "&amp;",
            "&x;",
            "<!DOCTYPE a>",
            "<![CDATA[",
            "]]>",
            "<!--",
            "-->",
            "<?x ?>",
            "\x00",
            "<?xml version='1.0'?>",
            "<DeleteResult>",
        ]
    ),
    max_size=20,
).map(lambda parts: "".join(parts).encode())


@given(st.one_of(st.binary(max_size=100), fragments))
def test_rubbish_is_refused_in_kos_own_words(document: bytes) -> None:
    with contextlib.suppress(S3Error):
        xml.parse_delete_request(document)
