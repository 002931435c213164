"""Under which name clients are told of the direct door: odd Host headers."""

from __future__ import annotations

import pytest

from serve_app.direct_url import IngestUrl

URL = IngestUrl(host="127.0.0.1", http_port=8350, door_id="0123456789abcdef")
EVERYWHERE = IngestUrl("0.0.0.0", 8350)


@pytest.mark.parametrize(
    ("url", "host_header", "told"),
    [
        (EVERYWHERE, "Lake.EXAMPLE:8350", "http://lake.example:9"),
        (EVERYWHERE, "lake.example.:8350", "http://lake.example.:9"),
        (EVERYWHERE, "[FD00:0:0::1]:8350", "http://[fd00::1]:9"),
        (EVERYWHERE, "my_lake:08350", "http://my_lake:9"),
        (EVERYWHERE, f"{'a' * 63}.example:8350", f"http://{'a' * 63}.example:9"),
        (IngestUrl("::", 8350), "[::1]:8350", "http://[::1]:9"),
        (IngestUrl("Lake.Example", 8350), "lake.example:8350", "http://lake.example:9"),
        (IngestUrl("FD00::0:1", 8350), "[fd00::1]:8350", "http://[fd00::1]:9"),
        (IngestUrl("::1", 8350), "LOCALHOST:8350", "http://[::1]:9"),
        (IngestUrl("Localhost", 8350), "127.0.0.1:8350", "http://Localhost:9"),
        (URL, "[::1]:8350", "http://127.0.0.1:9"),
    ],
)
def test_one_place_has_many_spellings(url: IngestUrl, host_header: str, told: str) -> None:
    assert url.for_client(host_header, 9) == told


@pytest.mark.parametrize(
    "host_header",
    [
        *("", ":", ":8350", "[]:8350", "...:8350", "a..b:8350", ".a:8350"),
        *("[::1]", "[::1]x:8350", "[::1:8350", "::1]:8350", "::1:8350", "fd00::1:8350"),
        *("[1.2.3.4]:8350", "[v1.a]:8350", "[lake]:8350", "[fe80::1%25eth0]:8350", "[:::]:8350"),
        *("0.0.0.0:8350", "[::]:8350", "[0:0::0]:8350"),
        *("lake.example", "lake.example:", "lake.example:x", "lake.example:+8350"),
        *("lake.example:-1", "lake.example:99999", "lake.example:8350:8350", "lake.example:80"),
        *("lake.example:8350\n", "lake.ex ample:8350", "key@lake.example:8350", "lake\r\nx:8350"),
        *(
            "lake.example/x:8350",
            "lake.example?:8350",
            "lake.example:\uff18\uff13\uff15\uff10",
            "läke:8350",
        ),
        *(f"{'a' * 64}:8350", f"{'a.' * 127}a:8350", "a" * 100_000, "a." * 50_000 + ":8350"),
        "[" + ":" * 100_000 + "]:8350",
    ],
)
def test_what_is_no_name_and_port_is_told_nothing(host_header: str) -> None:
    for url in (EVERYWHERE, URL, IngestUrl("::", 8350), IngestUrl("lake.example", 8350)):
        assert url.for_client(host_header, 9) is None
