"""`lakebus tables`, `snapshots`, `token`, `batch`, `trace`, `quarantine`, `keys`, `completion`, and
how the program ends, against a real socket."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from cluster import cli as cli_module
from cluster.cli import cli
from storage.ingesting.grants import Grant
from tests.unit.command_rig import Lake, lake
from tests.unit.http_rig import problem

__all__ = ["lake"]

ROOT = Path(__file__).parents[2]


async def ingest(lake: Lake, *rows: int | str, key: str = "k", **more: str) -> str:
    """The batch id."""

    options = [part for name, value in more.items() for part in (f"--{name}", value)]
    given = json.dumps([{"id": row} for row in rows])
    sent = await lake.run(
        *("ingest", "--table", "events", "--format", "json", "--key", key, "--json", *options),
        given=given,
    )
    assert sent.return_value == 0, sent.output
    return str(json.loads(sent.stdout)["receipts"][0]["batch_id"])


async def document(lake: Lake, *arguments: str) -> Any:
    done = await lake.run(*arguments, "--json")
    assert done.return_value == 0, done.output
    return json.loads(done.stdout)


async def test_tables_are_made_listed_and_shown(lake: Lake) -> None:
    made = await lake.run("tables", "create", "r", "sensor varchar NOT NULL", "c decimal(10, 2)")
    assert made.stdout == "the table r made, 2 columns\n"
    again = await lake.run("tables", "create", "r", "sensor varchar", "--if-not-exists")
    assert again.stdout == "the table r was there already, 2 columns\n"
    assert (await lake.run("tables", "create", "r", "sensor varchar")).return_value == 1
    with pytest.raises(click.UsageError, match="'id bigint'"):
        await lake.run("tables", "create", "s", "sensor")
    listed = (await lake.run("tables", "list")).stdout.splitlines()
    assert [line.split()[0] for line in listed] == ["name", "events", "r"]
    shown = (await lake.run("tables", "show", "r")).stdout
    assert "sensor  varchar        no" in shown
    assert "schema version" in shown
    assert (await document(lake, "tables", "show", "r"))["columns"][1]["type"] == "decimal(10,2)"
    assert len((await document(lake, "tables", "list"))["tables"]) == 2
    missing = await lake.run("tables", "show", "event")
    assert missing.return_value == 4
    assert "did you mean events?" in missing.stderr


async def test_snapshots_are_listed_and_shown(lake: Lake) -> None:
    await ingest(lake, 1, 2)
    await lake.server.publish()
    listed = (await lake.run("snapshots", "list", "-n", "2")).stdout.splitlines()
    assert [line.split()[0] for line in listed] == ["snapshot", "3", "2"]
    assert "events" in listed[1]
    assert "+2" in listed[1]
    newest = (await lake.run("snapshots", "show")).stdout
    assert "events" in newest
    assert "visibility token" in newest
    assert (await document(lake, "snapshots", "show", "2"))["snapshot_id"] == 2
    older = await document(lake, "snapshots", "list", "--before", "3")
    assert older["snapshots"][0]["snapshot_id"] == 2
    assert (await lake.run("snapshots", "show", "99")).return_value == 4


async def test_a_batch_is_followed_to_its_end(lake: Lake) -> None:
    first = await ingest(lake, 1)
    assert "durable, and not published yet" in (await lake.run("batch", first)).stdout
    late = await lake.run("batch", first, "--wait", "--timeout-s", "0.05")
    assert late.return_value == 3
    await lake.server.publish()
    done = await lake.run("batch", first, "--wait")
    assert (done.return_value, done.stdout) == (0, f"{first} is published in snapshot 3\n")
    second = await ingest(lake, 2, key="k2")
    await lake.server.publish(quarantine=True)
    bad = await lake.run("batch", second)
    assert bad.return_value == 6
    assert "is quarantined" in bad.stdout
    assert (await lake.run("batch", "b9-9-9")).return_value == 4


async def test_trace_tells_the_life_of_a_request_by_its_batch_or_its_key(lake: Lake) -> None:
    first = await ingest(lake, 1, 2, key="mine")
    waiting = (await lake.run("trace", first)).stdout
    assert f"{first}: 2 rows for events" in waiting
    assert "not published yet" in waiting
    claim = await lake.server.bus.claim(lake.server.worker().owner)
    assert claim is not None
    held = await document(lake, "trace", first)
    assert (held["state"], held["lease"]["epoch"]) == ("claimed", claim.lease.epoch)
    await lake.server.bus.release(claim.lease)
    assert "given back" in (await lake.run("trace", first)).stdout
    (published,) = await lake.server.publish()
    by_key = await document(lake, "trace", "mine", "--table", "Events")
    assert (by_key["batch_id"], by_key["state"], by_key["terminal"]) == (first, "published", True)
    assert by_key["publication"]["snapshot_id"] == published.snapshot_id
    (file,) = by_key["files"]
    assert (file["table"], file["rows"], file["last_snapshot_id"]) == ("events", 2, None)
    said = (await lake.run("trace", first)).stdout
    assert f"file        {file['file_id']} of events, 2 rows" in said
    assert f"visible     from snapshot {published.snapshot_id} on" in said
    bad = await ingest(lake, 3, key="bad")
    await lake.server.publish(quarantine=True)
    aside = await lake.run("trace", bad)
    assert aside.return_value == 6
    assert "set aside" in aside.stdout
    assert "visible" not in aside.stdout
    for unknown in (("b1-0-99",), ("b99-9-0",), ("nobody", "--table", "events")):
        assert (await lake.run("trace", *unknown)).return_value == 4
    with pytest.raises(click.UsageError, match="--table"):
        await lake.run("trace", "mine")


async def test_D10_a_trace_needs_admin_on_every_table(lake: Lake) -> None:
    first = await ingest(lake, 1, key="mine")
    for grants in ((Grant("admin", ("events",)),), (Grant("query"), Grant("ingest"))):
        key = await lake.server.new_key(*grants)
        for path in (f"/v1/admin/trace/{first}", "/v1/admin/trace?key=mine&target=events"):
            problem(await lake.server.get(path, api_key=key), 403, "forbidden")
    other = await lake.server.new_key(Grant("admin"), principal="other")
    found = await lake.server.get(f"/v1/admin/trace/{first}", api_key=other)
    assert found.json()["entry"]["rows"] == 1
    path = "/v1/admin/trace?key=mine&target=events"
    problem(await lake.server.get(path, api_key=other), 404, "batch_not_found")
    problem(await lake.server.get("/v1/admin/trace?key=mine"), 400, "malformed_request")


async def test_quarantine_is_listed_shown_mended_and_dropped(lake: Lake) -> None:
    await ingest(lake, 1, "x", **{"on-invalid": "quarantine"})
    await ingest(lake, "y", 2, key="k2", **{"on-invalid": "quarantine"})
    listed = (await lake.run("quarantine", "list")).stdout.splitlines()
    assert [line.split()[:2] for line in listed[1:]] == [["2", "rejects"], ["1", "rejects"]]
    shown = await lake.run("quarantine", "show", "1")
    assert '"x"' in shown.stdout
    assert (await lake.run("quarantine", "replay", "1")).return_value == 1
    mended = lake.file("mended.ndjson", '{"id": 7}\n')
    for said in ("1 row durable as batch", "as before"):
        replayed = await lake.run("quarantine", "replay", "1", "--file", mended)
        assert replayed.return_value == 0, replayed.stderr
        assert said in replayed.stderr
    item = (await document(lake, "quarantine", "list"))["items"][1]
    assert item["successor_batch_id"] in replayed.stderr
    with pytest.raises(click.exceptions.Abort):
        await lake.run("quarantine", "drop", "2", given="n\n")
    assert (await lake.run("quarantine", "drop", "2", "--yes")).stdout == "2 is dropped\n"
    assert (await lake.run("quarantine", "show", "2")).return_value == 4


async def test_keys_are_listed_and_revoked(lake: Lake) -> None:
    found = (await document(lake, "keys", "list"))["keys"]
    assert [key["principal"] for key in found] == ["root"]
    assert "admin" in (await lake.run("keys", "list")).stdout
    await lake.server.new_key(principal="leaver")
    (leaver,) = [key["key_id"] for key in (await document(lake, "keys", "list"))["keys"]
                 if key["principal"] == "leaver"]  # fmt: skip
    assert (await lake.run("keys", "revoke", leaver)).stdout == f"the key {leaver} is revoked\n"
    assert (await lake.run("keys", "revoke", "nothing")).return_value == 4


def test_every_command_is_where_the_list_says_and_is_explained() -> None:
    context = click.Context(cli)
    for name in cli.list_commands(context):
        command = cli.get_command(context, name)
        assert command is not None
        assert (command.name, bool(command.help)) == (name, True)
        for inner in getattr(command, "commands", {}).values():
            assert inner.help, f"{name} {inner.name}"
    listed = CliRunner().invoke(cli, ["--help"]).stdout
    assert all(f"  {name} " in listed for name in cli.list_commands(context))


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_shell_gets_a_script_that_asks_for_completions(
    shell: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["lakebus", "completion", shell])
    assert cli_module.main() == 0
    assert f"_LAKEBUS_COMPLETE={shell}_complete" in capsys.readouterr().out
    monkeypatch.setenv("_LAKEBUS_COMPLETE", f"{shell}_complete")
    monkeypatch.setenv("COMP_WORDS", "lakebus snap")
    monkeypatch.setenv("COMP_CWORD", "snap" if shell == "fish" else "1")
    with pytest.raises(SystemExit):
        cli_module.main()
    assert "snapshots" in capsys.readouterr().out


def test_ctrl_c_and_a_reader_that_has_gone_are_quiet(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def ends(error: BaseException) -> int:
        def run(**_: Any) -> int:
            raise error

        monkeypatch.setattr(cli, "main", run)
        return cli_module.main()

    interrupted = click.exceptions.Abort()
    interrupted.__cause__ = KeyboardInterrupt()
    assert ends(interrupted) == 130
    assert capfd.readouterr() == ("", "")
    assert ends(click.exceptions.Abort()) == 130
    assert "aborted" in capfd.readouterr().err
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as nobody_reads:
        piped = subprocess.run(
            [sys.executable, "-m", "lakebus", "completion", "bash"],
            cwd=ROOT,
            stdout=nobody_reads,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert (piped.returncode, piped.stderr) == (141, b"")
