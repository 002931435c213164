"""One run: a stack, client processes, a schedule of faults, the end, and the verdict."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import machine
from lakebus.tokens import TokenCodec
from tests.chaos import ending, recovery, schedule, source, verdict
from tests.chaos.children import Child, ChildFailed
from tests.chaos.database import AWAY, superuser_dsn
from tests.chaos.evidence import Evidence
from tests.chaos.injector import Done, Injector
from tests.chaos.kinds import Placement, available
from tests.chaos.schedule import Fault
from tests.chaos.session import Place, Session
from tests.chaos.soak.judging import PAIRS_MIN
from tests.chaos.soak.settings import SETTINGS as SOAK_SETTINGS
from tests.chaos.soak.side import SoakSide, Told
from tests.chaos.stack import ChaosStack, StackDown
from tests.chaos.workload import WorkloadConfig
from tests.history.checker import check
from tests.history.end_state import EndState, dump_postgres, write_end_state
from tests.history.record import History, load
from tests.history.recorder import Recorder

_PRINCIPALS = ("alice", "bob")
_PROCESSES = 2
_SERVED_S, _DRAINED_S, _CLIENTS_END_S = 150.0, 120.0, 200.0
#: A stack that starts anew takes no load meanwhile: little of a soak is for that.
_SOAK_HEAVY_SHARE = 0.1
#: Request numbers of the run itself, beyond those of the client processes.
_OWN_REQUESTS = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Options:
    """What is run. `kinds`: only these, by name; empty: all that can be done. `settings`:
    environment settings of the stack beyond those of every run. `maintenance`: a soak, in which
    `pairs` questions are asked again and again at the snapshots that answered them."""

    seed: int
    seconds: float
    placement: Placement = Placement.TOGETHER
    kills: bool = False
    gap_s: float = 3.0
    kinds: tuple[str, ...] = ()
    writers: int = 3
    readers: int = 2
    settings: tuple[tuple[str, str], ...] = ()
    maintenance: bool = False
    pairs: int = PAIRS_MIN


@dataclass(slots=True)
class Report:
    """What was done and found; `as_json` is what is kept."""

    options: Options
    folder: Path
    machine: dict[str, object]
    start_s: float = 0.0
    faults: list[dict[str, Any]] = field(default_factory=list)
    operations: dict[str, dict[str, int]] = field(default_factory=dict)
    evidence: dict[str, int] = field(default_factory=dict)
    served_after_s: float | None = None
    drained_after_s: float | None = None
    verdict: str = ""
    soak: Told | None = None
    problems: list[str] = field(default_factory=list)

    @property
    def held(self) -> bool:
        return not self.problems

    def as_json(self) -> dict[str, Any]:
        document = asdict(self)
        document["folder"] = str(self.folder)
        return document


async def run(options: Options, folder: Path, *, say: Callable[[str], None] = print) -> Report:
    """Runs it in `folder`, which keeps the record, the schedule, the report, and after a failure
    logs and files."""
    folder.mkdir(parents=True, exist_ok=True)
    report = Report(options, folder, machine.describe())
    settings = (dict(SOAK_SETTINGS) if options.maintenance else {}) | dict(options.settings)
    # What tags keep of half an hour is more than a disk that is there to be filled.
    stack = ChaosStack(
        options.placement, logs=folder, settings=settings, small_disk=not options.maintenance
    )
    work = _Work(options, report, stack, say)
    try:
        await work.run()
    except (StackDown, ChildFailed) as error:
        report.problems.append(f"{type(error).__name__}: {error}")
    finally:
        report.problems += stack.unexpected_ends
        report.problems += await stack.stop()
        if not report.held:
            await asyncio.to_thread(stack.keep, folder)
        await asyncio.to_thread(stack.remove)
        (folder / "report.json").write_text(json.dumps(report.as_json(), indent=1))
    return report


class _Work:
    """The steps of one run, in order."""

    def __init__(
        self, options: Options, report: Report, stack: ChaosStack, say: Callable[[str], None]
    ) -> None:
        self._options = options
        self._report = report
        self._stack = stack
        self._say = say
        self._folder = report.folder
        self._clients: list[Child] = []
        self._faults: tuple[Fault, ...] = ()
        self._soak: SoakSide | None = None
        if options.maintenance:
            self._soak = SoakSide(
                stack,
                self._folder,
                seed=options.seed,
                seconds=options.seconds,
                pairs=options.pairs,
            )
            report.soak = self._soak.told

    async def run(self) -> None:
        options, report = self._options, self._report
        report.start_s = round(await self._stack.start(), 1)
        self._say(f"the stack answers after {report.start_s} s")
        self._plan()
        secret = await self._stack.superuser.values("SELECT token_secret FROM lakebus.lake")
        recorder = Recorder.to_file(self._folder / "run.jsonl", process="run", seed=options.seed)
        codec = TokenCodec(secret[0])
        evidence = Evidence(self._stack)
        collecting = asyncio.create_task(evidence.collect())
        try:
            session = self._session(recorder, codec)
            await self._make_tables(session)
            await self._start_clients(codec_secret=secret[0].hex(), session=session)
            injector = Injector(self._stack, note=recorder.note)
            try:
                await self._inject(injector)
            finally:
                await injector.heal()
                await self._settle(session, injector)
                healthy_since = time.monotonic_ns()
                await self._end_clients()
            truth = await self._look(session)
            session.close()
        finally:
            if self._soak is not None:
                await self._soak.abandon()
            collecting.cancel()
            await asyncio.gather(collecting, return_exceptions=True)
            recorder.close()
        with contextlib.suppress(OSError):
            await asyncio.to_thread(evidence.look)
        report.evidence = evidence.sums()
        await self._judge(injector, truth, healthy_since)

    # --- before ---------------------------------------------------------------------------------

    def _plan(self) -> None:
        options = self._options
        kinds = available(
            options.placement,
            offers=self._stack.offers,
            kills=options.kills,
            maintenance=options.maintenance,
        )
        if options.kinds:
            kinds = tuple(kind for kind in kinds if kind.name in options.kinds)
        self._faults = schedule.schedule(
            options.seed,
            kinds,
            seconds=options.seconds,
            gap_s=options.gap_s,
            kills=options.kills,
            maintenance=options.maintenance,
            heavy_share=_SOAK_HEAVY_SHARE if options.maintenance else 0.5,
        )
        (self._folder / "schedule.json").write_text(schedule.as_json(self._faults))
        self._say(f"{len(self._faults)} faults of {len(kinds)} kinds are planned")

    def _session(self, recorder: Recorder, codec: TokenCodec) -> Session:
        address = self._stack.address
        place = Place(address.url, address.api_key, "local")
        return Session(place, name="run", recorder=recorder, codec=codec, timeout_s=110.0)

    async def _make_tables(self, session: Session) -> None:
        for table in (*source.TABLES, source.PROBE_TABLE):
            made = await session.create_table(table, source.columns())
            if not made.ok:
                raise StackDown(f"the table {table} could not be made: {made.code}")
        if self._soak is not None:
            await self._soak.make_tables(session)

    async def _start_clients(self, *, codec_secret: str, session: Session) -> None:
        keys = {}
        for principal in _PRINCIPALS:
            made = await session.post(
                "/v1/admin/keys",
                {"principal": principal, "scopes": [{"scope": "ingest"}, {"scope": "query"}]},
            )
            if not made.ok:
                raise StackDown(f"no key for {principal}: {made.code}")
            keys[principal] = made.answer["key"]
        for index in range(_PROCESSES):
            config = WorkloadConfig(
                url=self._stack.address.url,
                api_keys=keys,
                token_secret=codec_secret,
                seed=self._options.seed,
                index=index,
                processes=_PROCESSES,
                record=str(self._folder / f"clients-{index}.jsonl"),
                writers=self._options.writers,
                readers=self._options.readers,
                whole_every_s=max(20.0, self._options.seconds / 20),
            )
            path = self._stack.folder / f"clients-{index}.json"
            config.write(path)
            self._clients.append(
                await Child.start(
                    "tests.chaos.workload", str(path), log=self._folder / f"clients-{index}.log"
                )
            )
        for client in self._clients:
            await client.hear(timeout_s=60.0)
        if self._soak is not None:
            await self._soak.start(token_secret=codec_secret)

    # --- during ---------------------------------------------------------------------------------

    async def _inject(self, injector: Injector) -> None:
        zero_s = time.monotonic()
        end_s = zero_s + self._options.seconds
        playing = asyncio.create_task(injector.play(self._faults, zero_s=zero_s))
        said_s = zero_s
        while not playing.done():
            await asyncio.wait((playing,), timeout=5.0)
            soaking = self._soak is None or self._soak.alive()
            for client in self._clients:
                if not client.mark.alive() or not soaking:
                    raise ChildFailed("a client process has ended; its log says why")
            if time.monotonic() - said_s > 30.0:
                said_s = time.monotonic()
                struck = sum(1 for one in injector.done if one.healed_s and not one.missed)
                self._say(f"{said_s - zero_s:4.0f} s: {struck} faults done")
        await playing
        await asyncio.sleep(max(0.0, min(2.0, end_s - time.monotonic())))

    async def _settle(self, session: Session, injector: Injector) -> None:
        """Everything is healed: the stack has to serve again by itself."""
        report = self._report
        try:
            seconds = await ending.served(session, number=_OWN_REQUESTS, within_s=_SERVED_S)
        except ending.Hangs as error:
            report.problems.append(str(error))
            return
        report.served_after_s = round(seconds, 2)
        await injector.restored()
        self._say(f"served again after {report.served_after_s} s; clients come to their end")

    async def _end_clients(self) -> None:
        served = self._report.served_after_s is not None
        patience_s = _CLIENTS_END_S if served else 20.0
        clients, self._clients = self._clients, []
        soak = self._soak.stop() if served and self._soak is not None else asyncio.sleep(0)
        codes, _ = await asyncio.gather(
            asyncio.gather(*(client.end(timeout_s=patience_s) for client in clients)), soak
        )
        self._report.problems += [
            f"client process {n} ended with {code}" for n, code in enumerate(codes) if code != 0
        ]

    # --- after ----------------------------------------------------------------------------------

    async def _look(self, session: Session) -> EndState | None:
        """The truth at the end; None when there is none to be had."""
        report, stack = self._report, self._stack
        drained = False
        try:
            seconds = await ending.drained(stack.superuser, within_s=_DRAINED_S)
            report.drained_after_s = round(seconds, 2)
            drained = True
        except ending.Hangs as error:
            report.problems.append(str(error))
        if report.served_after_s is not None:
            session.close()  # it was idle for so long that the balancer may have ended it
            report.problems += await ending.last_reads(session)
            if self._soak is not None:
                await self._soak.finish(session, say=self._say)
        try:
            truth = await dump_postgres(superuser_dsn(stack.database_folder), drained=drained)
            truth, problems = await ending.looked_at_files(
                stack.superuser, stack.objects.folder, truth
            )
        except AWAY as error:
            report.problems.append(f"the database does not tell its truth: {error!r}")
            return None
        report.problems += problems
        write_end_state(self._folder / "end_state.json", truth)
        return truth

    async def _judge(self, injector: Injector, truth: EndState | None, healthy_since: int) -> None:
        report, options = self._report, self._options
        history = load(sorted(self._folder.glob("*.jsonl")))
        found = await asyncio.to_thread(check, history, truth)
        report.verdict = str(found)
        report.operations = verdict.outcomes(history)
        report.faults = fault_rows(history, injector.done)
        if not found.ok:
            report.problems.append("the checker found anomalies: see the verdict")
        report.problems += verdict.findings(history)
        if self._soak is not None:
            report.problems += self._soak.judge(history, truth, report.evidence)
        report.problems += verdict.late_failures(history, healthy_since=healthy_since)
        minima = verdict.Minima.of(seconds=options.seconds, planned=len(self._faults))
        report.problems += verdict.too_little(history, injector.done, minima)
        report.problems += [
            f"fault {one.fault.number} {one.fault.kind}: not whole again"
            for one in injector.done
            if one.restored_s is None and not one.missed and must_be_restored(one)
        ]


def must_be_restored(done: Done) -> bool:
    return done.fault.kind.startswith("kill_")


def fault_rows(history: History, done: Sequence[Done]) -> list[dict[str, Any]]:
    """One row for each fault: what, whom, when, and how long it was felt."""
    found = recovery.cycles(history)
    zero_s = min((one.began_s - one.fault.at_s for one in done), default=0.0)
    return [
        {
            "number": one.fault.number,
            "kind": one.fault.kind,
            "victim": one.victim,
            "at_s": round(one.began_s - zero_s, 2),
            "lasted_s": round(one.healed_s - one.began_s, 2),
            "missed": one.missed,
            "restored_s": None if one.restored_s is None else round(one.restored_s, 2),
            "served_again_s": _rounded(recovery.served_again_s(found, int(one.began_s * 1e9))),
        }
        for one in sorted(done, key=lambda one: one.began_s)
    ]


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)
