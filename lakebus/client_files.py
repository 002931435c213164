"""Files of rows, by the names they have: which form is inside, and whether it is compressed."""

from __future__ import annotations

import os
from pathlib import Path

from lakebus.client_errors import package_missing
from lakebus.errors import MalformedBody

ARROW = "application/vnd.apache.arrow.stream"
CSV = "text/csv"
JSON = "application/json"
NDJSON = "application/x-ndjson"
PARQUET = "application/vnd.apache.parquet"
MEDIA_TYPES = {"json": JSON, "ndjson": NDJSON, "csv": CSV, "arrow": ARROW, "parquet": PARQUET}
_SUFFIXES = {
    **{".json": JSON, ".ndjson": NDJSON, ".jsonl": NDJSON},
    **{".csv": CSV, ".parquet": PARQUET, ".pq": PARQUET},
    **{".arrow": ARROW, ".arrows": ARROW, ".ipc": ARROW, ".feather": ARROW},
}
#: The API's Content-Encoding of files that are sent as they are.
_CODINGS = {".gz": "gzip", ".zst": "zstd", ".lz4": "lz4"}
_ARROW_FILE_MAGIC = b"ARROW1"


def read_file(path: str | os.PathLike[str]) -> tuple[bytes, str, str | None]:
    """(content, media type, coding) of a file. Raises MalformedBody, and OSError as `open` does."""

    file = Path(path)
    suffixes = [suffix.lower() for suffix in file.suffixes]
    coding = _CODINGS.get(suffixes[-1]) if suffixes else None
    if coding is not None:
        suffixes.pop()
    media_type = _SUFFIXES.get(suffixes[-1]) if suffixes else None
    if media_type is None:
        known = ", ".join(sorted(_SUFFIXES))
        raise MalformedBody(
            f"the name {file.name!r} does not say what is inside: it must end in one of {known}"
            " (and .gz, .zst or .lz4 behind it); or give (bytes, media type)"
        )
    content = file.read_bytes()
    if media_type == ARROW and coding is None and content.startswith(_ARROW_FILE_MAGIC):
        content = _stream_of_arrow_file(content, file.name)
    return content, media_type, coding


def _stream_of_arrow_file(content: bytes, name: str) -> bytes:
    """The API takes Arrow streams; a file has the same batches and an index behind them."""

    try:
        import pyarrow as pa  # here, because the client works without it
    except ImportError:
        raise package_missing("pyarrow", "an Arrow file (one that is not a stream)") from None
    sink = pa.BufferOutputStream()
    try:
        with pa.ipc.open_file(content) as reader, pa.ipc.new_stream(sink, reader.schema) as writer:
            for n in range(reader.num_record_batches):
                writer.write_batch(reader.get_batch(n))
    except (pa.ArrowException, OSError) as error:
        raise MalformedBody(f"{name!r} is not a whole Arrow file: {error}") from error
    stream: bytes = sink.getvalue().to_pybytes()
    return stream
