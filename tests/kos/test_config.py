"""The configuration: what is read, what is refused, and in which words."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kos import config
from kos.errors import ConfigError

GOOD = """\
region: city-a
listen: {s3: 127.0.0.1:9000, admin: 127.0.0.1:9001, peer: 127.0.0.1:9002}
workers: 2
origin: {endpoint: http://127.0.0.1:5000, region: us-east-1, addressing: path, access_key: ORIGIN, secret_key: osecret}
cache: {dir: /var/lib/kos/cache, size: 100GiB, block_size: 8MiB, segment_size: 256MiB}
credentials: [{access_key: CLIENT, secret_key: csecret}]
rules: [{match: "datasets/*", freshness: immutable}, {match: "*", freshness: 30s}]
control: {url: "sqlite:////var/lib/kos/control.db"}
"""


def write(directory: Path, text: str) -> Path:
    path = directory / "kos.yaml"
    path.write_text(text)
    return path


def refusal(directory: Path, text: str, environ: dict[str, str] | None = None) -> str:
    path = write(directory, text)
    with pytest.raises(ConfigError) as caught:
        config.load(path, environ or {})
    return str(caught.value).replace(f"{path}", "FILE")


def test_the_contract(tmp_path: Path) -> None:
    loaded = config.load(write(tmp_path, GOOD))
    assert loaded.region == "city-a"
    assert loaded.listen == config.Listen(s3="127.0.0.1:9000", admin="127.0.0.1:9001", peer="127.0.0.1:9002")
    assert loaded.origin.endpoint == "http://127.0.0.1:5000"
    assert (loaded.origin.access_key, loaded.origin.secret_key) == ("ORIGIN", "osecret")
    assert loaded.cache.size_bytes == 100 << 30
    assert (loaded.cache.block_bytes, loaded.cache.segment_bytes) == (8 << 20, 256 << 20)
    assert loaded.cache.index_bytes == (100 << 30) // 32
    assert loaded.credentials == (config.Credential(access_key="CLIENT", secret_key="csecret"),)
    assert [(rule.match, rule.freshness) for rule in loaded.rules] == [("datasets/*", math.inf), ("*", 30.0)]
    assert loaded.control.url == "sqlite:////var/lib/kos/control.db"


def test_the_least(tmp_path: Path) -> None:
    loaded = config.load(
        write(
            tmp_path,
            "region: a\norigin: {endpoint: https://s3.example.org/}\ncache: {dir: /c, size: 2GiB}\n"
            "credentials: [{access_key: k, secret_key: s}]\n",
        )
    )
    assert loaded.workers == 2
    assert loaded.rules == ()
    assert loaded.origin.endpoint == "https://s3.example.org"
    assert loaded.origin.access_key is None
    assert loaded.limits == config.Limits()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("size: 100GiB", "size: 100Gb"),
            "FILE:5: cache.size: found '100Gb', allowed: bytes with unit KiB MiB GiB TiB",
        ),
        (("size: 100GiB", "size: -1GiB"), "FILE:5: cache.size: found '-1GiB', allowed: bytes"),
        (("size: 100GiB", "size: ~"), "FILE:5: cache.size: found '~', allowed: bytes"),
        (("size: 100GiB", "size: [1GiB]"), "FILE:5: cache.size: found a list, allowed: bytes"),
        (("size: 100GiB, ", ""), "FILE:5: cache.size: found nothing, allowed: bytes"),
        (("size: 100GiB", "size: 1GiB"), "FILE:5: cache.size: found 1GiB, allowed: at least 4 segments and the index"),
        (("block_size: 8MiB", "block_size: 9MiB"), "FILE:5: cache.block_size: found 9MiB, allowed: 4KiB times a power"),
        (
            ("segment_size: 256MiB", "segment_size: 4MiB"),
            "found 8MiB in segments of 4MiB, allowed: at most cache.segment",
        ),
        (
            ("block_size", "blok_size"),
            "FILE:5: cache.blok_size: found an unknown key, allowed: block_size (perhaps meant)",
        ),
        (("workers: 2", "workers: 0"), "FILE:3: workers: found '0', allowed: a whole number from 1 to 256"),
        (("workers: 2", "workers: two"), "FILE:3: workers: found 'two'"),
        (("workers: 2", "workers: 2\nworkers: 3"), "FILE:4: workers: found the key a second time (first on line 3)"),
        (("workers: 2", "wrokers: 2"), "FILE:3: wrokers: found an unknown key, allowed: workers (perhaps meant)"),
        (
            ("admin: 127.0.0.1:9001", "admin: 127.0.0.1:9000"),
            "FILE:2: listen.admin: found 127.0.0.1:9000 as in listen.s3",
        ),
        (("admin: 127.0.0.1:9001", "admin: 0.0.0.0:9000"), "FILE:2: listen.admin: found 0.0.0.0:9000 as in listen.s3"),
        (
            ("s3: 127.0.0.1:9000", "s3: none"),
            "FILE:2: listen.s3: found none, and no s3_tls, allowed: an address for s3",
        ),
        (("s3: 127", "s3_tls: 127.0.0.1:9443, s3: 127"), "FILE:2: listen.tls_cert_file: found nothing, but s3_tls"),
        (
            ("s3: 127", "tls_key_file: /k, s3: 127"),
            "FILE:2: listen.tls_key_file: found no s3_tls, allowed: only beside",
        ),
        (
            ("s3: 127", "s3_tls: 127.0.0.1:9000, tls_cert_file: /c, tls_key_file: /k, s3: 127"),
            "FILE:2: listen.s3_tls: found 127.0.0.1:9000 as in listen.s3, allowed: an address of its own",
        ),
        (
            ("s3: 127", "tls_cert_file: c.pem, s3: 127"),
            "listen.tls_cert_file: found 'c.pem', allowed: an absolute path",
        ),
        (("s3: 127.0.0.1:9000", "s3: 127.0.0.1"), "FILE:2: listen.s3: found '127.0.0.1', allowed: HOST:PORT"),
        (("s3: 127.0.0.1:9000", "s3: 127.0.0.1:70000"), "listen.s3: found '127.0.0.1:70000'"),
        (("s3: 127.0.0.1:9000", "s3: 127.0.0.300:9000"), "listen.s3: found '127.0.0.300:9000'"),
        (("s3: 127.0.0.1:9000", "s3: '[::g]:9000'"), "listen.s3: found '[::g]:9000'"),
        (("http://127.0.0.1:5000", "127.0.0.1:5000"), "FILE:4: origin.endpoint: found '127.0.0.1:5000', allowed: http"),
        (("http://127.0.0.1:5000", "http://h/path"), "origin.endpoint: found 'http://h/path'"),
        (("addressing: path", "addressing: vhost"), "origin.addressing: found 'vhost', allowed: path | virtual"),
        ((", secret_key: osecret", ""), "origin.access_key: found access_key without secret_key, allowed: both"),
        (("freshness: 30s", "freshness: 30"), "rules[1].freshness: found '30', allowed: immutable | always | a time"),
        (("freshness: 30s", "freshness: forever"), "FILE:7: rules[1].freshness: found 'forever'"),
        (('match: "*"', 'match: "a[b"'), "rules[1].match: found 'a[b', allowed: a glob over bucket or bucket/key"),
        (('match: "*"', 'match: "/a"'), "rules[1].match: found '/a'"),
        (('match: "*"', 'match: ""'), "rules[1].match: found ''"),
        (("rules: [", "rules: [7, "), "FILE:7: rules[0]: found '7', allowed: a mapping of options"),
        (("[{access_key: CLIENT, secret_key: csecret}]", "[]"), "FILE:6: credentials: found an empty list"),
        (
            ("[{access_key: CLIENT, secret_key: csecret}]", "{}"),
            "FILE:6: credentials: found a mapping, allowed: a list",
        ),
        (
            (", secret_key: csecret", ""),
            "credentials[0].secret_key: found nothing, allowed: one of secret_key secret_key_f",
        ),
        (("sqlite:////var/lib/kos/control.db", "mysql://u:geheim@h/db"), "control.url: found 'mysql://…@h/db'"),
    ],
)
def test_refusals(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    assert change[0] in GOOD
    assert message in refusal(tmp_path, GOOD.replace(*change))


def test_the_same_access_key_twice(tmp_path: Path) -> None:
    text = GOOD.replace("secret_key: csecret}", "secret_key: csecret}, {access_key: CLIENT, secret_key: other}")
    assert "FILE:6: credentials[1].access_key: found 'CLIENT' again" in refusal(tmp_path, text)


def test_everything_wrong_is_said_at_once_in_order(tmp_path: Path) -> None:
    text = GOOD.replace("workers: 2", "workers: x").replace("100GiB", "much").replace("region: city-a", "region: a/b")
    lines = refusal(tmp_path, text).splitlines()
    assert [line.split(": ")[0:2] for line in lines] == [
        ["FILE:1", "region"],
        ["FILE:3", "workers"],
        ["FILE:5", "cache.size"],
    ]


@pytest.mark.parametrize("text", ["", "- a\n", "just words\n", "a: [1\n", "a: 'b\n", "\tx: 1\n", "a: &x {b: *x}\n"])
def test_what_is_no_configuration_at_all(tmp_path: Path, text: str) -> None:
    assert "FILE" in refusal(tmp_path, text)


_CLUSTERS = {
    "membership: static, secret: short": "cluster.secret: found 5 characters, allowed: at least 16 characters",
    "membership: control": "cluster.secret: found nothing, allowed: at least 16",
    "membership: control, SECRET, heartbeat: 6s": "cluster.heartbeat: found 6s with member_lease 15s, allowed: at most",
    "membership: control, SECRET, write_wait: 33s": "cluster.write_wait: found 33s with member_lease 15s, allowed: more than 33s",
    "membership: control, SECRET, member_lease: 10m": "cluster.write_wait: found 40s with member_lease 10m, allowed: more than",
    "membership: static, SECRET, lease: 10s, write_wait: 10s": "cluster.write_wait: found 10s with lease 10s, allowed: more",
    "membership: static, SECRET, hedge_least: 2s, hedge_most: 1s": "cluster.hedge_least: found more than hedge_most",
    "membership: static, SECRET, name: b": "members: found no member 'b', allowed: this node's own cluster.name",
    "membership: control, SECRET, advertise: members": "members: found a list, and cluster.membership control",
}


@pytest.mark.parametrize("cluster", _CLUSTERS)
def test_clusters_that_cannot_be(tmp_path: Path, cluster: str) -> None:
    text = f"{GOOD}\ncluster: {{{cluster.replace('SECRET', 'secret: sixteen characters')}}}"
    if "static" in cluster or "members" in cluster:
        text += "\nmembers: [{name: a, peer: 'h:1', cluster: 'h:2'}]"
    assert _CLUSTERS[cluster] in refusal(tmp_path, text)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "kos.yaml"
    path.write_bytes(b"region: \xff\n")
    with pytest.raises(ConfigError, match="not UTF-8"):
        config.load(path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        config.load(tmp_path / "none.yaml")


def test_secrets_from_a_file_and_from_the_environment(tmp_path: Path) -> None:
    (tmp_path / "origin.secret").write_text("from-file\n")
    text = GOOD.replace("secret_key: osecret", "secret_key_file: origin.secret")
    text = text.replace("secret_key: csecret", "secret_key_env: CLIENT_SECRET")
    loaded = config.load(write(tmp_path, text), {"CLIENT_SECRET": "from-env"})
    assert loaded.origin.secret_key == "from-file"
    assert loaded.credentials[0].secret_key == "from-env"


def test_secrets_that_are_not_there(tmp_path: Path) -> None:
    text = GOOD.replace("secret_key: osecret", "secret_key_file: no.secret")
    text = text.replace("secret_key: csecret", "secret_key_env: NO_SECRET")
    said = refusal(tmp_path, text)
    assert "origin.secret_key_file: found 'no.secret': No such file" in said
    assert "credentials[0].secret_key_env: found no environment variable 'NO_SECRET'" in said


def test_a_secret_given_twice(tmp_path: Path) -> None:
    text = GOOD.replace("secret_key: osecret", "secret_key: osecret, secret_key_env: X")
    said = refusal(tmp_path, text)
    assert "found secret_key and secret_key_env" in said
    assert "osecret" not in said


@pytest.mark.parametrize("bad", ["secret_key: [osecret]", 'secret_key: "osecret\\n"', "sercet_key: osecret"])
def test_no_secret_in_any_message_nor_in_repr(tmp_path: Path, bad: str) -> None:
    assert "osecret" not in refusal(tmp_path, GOOD.replace("secret_key: osecret", bad))
    loaded = config.load(write(tmp_path, GOOD))
    assert "osecret" not in repr(loaded)
    assert "csecret" not in repr(loaded)


def test_the_environment_changes_nothing_but_secrets(tmp_path: Path) -> None:
    assert config.load(write(tmp_path, GOOD), {"KOS_WORKERS": "7", "WORKERS": "7"}).workers == 2


def test_ipv6_and_port_zero(tmp_path: Path) -> None:
    text = GOOD.replace("127.0.0.1:9000", "'[::1]:0'").replace("127.0.0.1:9001", "'[::1]:0'")
    loaded = config.load(write(tmp_path, text))
    assert config.split_address(loaded.listen.s3) == ("::1", 0)


@given(st.data())
def test_whatever_stands_in_a_file_it_is_good_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Any edit of a good file loads, or raises ConfigError with the file's name in every line; nothing else."""
    start = data.draw(st.integers(0, len(GOOD)))
    stop = data.draw(st.integers(start, min(len(GOOD), start + 30)))
    junk = data.draw(st.one_of(st.text(max_size=8), st.text(alphabet="{}[]:,&*!|>?-'\"#%@ \n\t0aé", max_size=12)))
    path = tmp_path_factory.getbasetemp() / "edited.yaml"
    path.write_text(GOOD[:start] + junk + GOOD[stop:], encoding="utf-8", errors="surrogatepass")
    try:
        config.load(path, {})
    except ConfigError as error:
        assert all(line.startswith(f"{path}") for line in str(error).split("\n"))
