"""The kinds of faults: what each strikes, where it can be done, how often it is drawn.

A kind's name is stable: it stands in kept results and in regressions.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class Placement(StrEnum):
    """The shapes of stack that can be run."""

    TOGETHER = "together"  # one process for all roles; PostgreSQL of the stack's own
    SPREAD = "spread"  # an actor for each role; PostgreSQL behind a proxy that makes faults
    TWO_NODES = "two-nodes"  # as `spread`, on a Ray cluster of two nodes


class Group(StrEnum):
    """How a fault is made; `tests/chaos/injector.py` has one method for each."""

    KILL = "kill"  # SIGKILL to one process
    FREEZE = "freeze"  # SIGSTOP to one process, SIGCONT later
    SIGNAL = "signal"  # another signal to one process
    SESSIONS = "sessions"  # PostgreSQL connections: ended, taken, or holding something
    DISK = "disk"
    NETWORK = "network"  # between the stack and PostgreSQL
    NODE = "node"  # a whole Ray node
    STACK = "stack"  # `lakebus up` itself, started again by us as an operator would


class Need(StrEnum):
    """What a machine or a run must offer for a kind."""

    ROOT = "root"
    OWN_DISK = "own_disk"  # the data folder lies on a small file system


_ALL = frozenset(Placement)
_TOGETHER = frozenset({Placement.TOGETHER})
_APART = frozenset({Placement.SPREAD, Placement.TWO_NODES})
_NODES = frozenset({Placement.TWO_NODES})
_ONE_NODE = frozenset({Placement.TOGETHER, Placement.SPREAD})


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of fault.

    :param victim: the kind of process that is struck (`tests/chaos/victims.py`), "" for none.
    :param weight: how many cards it has in the deck of an ordinary run.
    :param kill_weight: how many in the deck of a run of kills; 0: not in it.
    :param soak_weight: how many in the deck of a soak; 0: not in it.
    :param hold_s: shortest and longest time that it lasts.
    :param quiet_s: how long after its end no process of Ray's side is struck, because the stack is
        still starting anew; faults of the database, disk and network go on.
    """

    name: str
    group: Group
    victim: str = ""
    placements: frozenset[Placement] = _ALL
    weight: int = 1
    kill_weight: int = 0
    soak_weight: int = 0
    hold_s: tuple[float, float] = (0.0, 0.0)
    quiet_s: float = 0.0
    needs: frozenset[Need] = frozenset()

    @property
    def on_ray(self) -> bool:
        """Whether it needs the processes of Ray's side to be there."""
        return self.group in (Group.NODE, Group.STACK) or (
            bool(self.victim) and self.victim not in DATABASE_VICTIMS
        )

    @property
    def heavy(self) -> bool:
        return self.quiet_s > 0


DATABASE_VICTIMS = frozenset({"postmaster", "backend"})
_RESTART_S, _GCS_S, _NODE_S = 45.0, 110.0, 25.0


def _kill(
    victim: str,
    weight: int,
    kill_weight: int = 0,
    soak_weight: int = 0,
    *,
    placements: frozenset[Placement] = _ALL,
    quiet_s: float = 0.0,
) -> Kind:
    return Kind(
        name=f"kill_{victim}",
        group=Group.KILL,
        victim=victim,
        placements=placements,
        weight=weight,
        kill_weight=kill_weight,
        soak_weight=soak_weight,
        quiet_s=quiet_s,
    )


def _freeze(
    victim: str,
    low: float,
    high: float,
    *,
    placements: frozenset[Placement] = _ALL,
    weight: int = 1,
    soak_weight: int = 0,
    name: str = "",
) -> Kind:
    return Kind(
        name=name or f"freeze_{victim}",
        group=Group.FREEZE,
        victim=victim,
        placements=placements,
        weight=weight,
        soak_weight=soak_weight,
        hold_s=(low, high),
    )


def _node(name: str, low: float, high: float, *, weight: int) -> Kind:
    return Kind(
        name, Group.NODE, placements=_NODES, weight=weight, hold_s=(low, high), quiet_s=_NODE_S
    )


# fmt: off
KINDS: tuple[Kind, ...] = (
    # Ours.
    _kill("core", 3, 6, 8, placements=_TOGETHER),
    _kill("coordinator", 3, 7, 4, placements=_APART),
    _kill("publisher", 2, 3, 3, placements=_APART),
    _kill("lease_manager", 2, 3, 2, placements=_APART),
    _kill("role_supervisor", 1, 2, 1, placements=_APART),
    _kill("ingest_replica", 2, 2, 2),
    _kill("query_replica", 2, 2, 3),
    _kill("query_child", 3, 9, 4),
    # Jobs of maintenance are drawn in a soak only: elsewhere there may be none to strike.
    _kill("maintainer", 0, 0, 3, placements=_APART),
    _kill("job", 0, 0, 10),
    # Ray's.
    _kill("serve_controller", 1, 1, 1),
    _kill("proxy_actor", 1, 1),
    _kill("haproxy_manager", 1, 1),
    _kill("haproxy", 2, 1, 1),
    _kill("ray_agent", 1, quiet_s=_RESTART_S),
    _kill("raylet", 1, quiet_s=_RESTART_S, placements=_ONE_NODE),
    _kill("gcs", 1, quiet_s=_GCS_S, placements=_ONE_NODE),
    _kill("ray_host", 1, 0, 1, quiet_s=_RESTART_S),
    Kind("kill_up", Group.STACK, "up", soak_weight=1, quiet_s=_RESTART_S),
    # PostgreSQL's.
    _kill("postmaster", 2, 4, 3),
    _kill("backend", 3, 14, 6),
    # Stopped past the end of a lease, then gone on.
    _freeze("core", 2.5, 5.0, placements=_TOGETHER, weight=2, soak_weight=2),
    _freeze("coordinator", 2.5, 6.0, placements=_APART, weight=4, soak_weight=2),
    _freeze("publisher", 2.5, 5.0, placements=_APART, weight=2, soak_weight=1),
    _freeze("lease_manager", 2.5, 5.0, placements=_APART, weight=2),
    _freeze("ingest_replica", 1.5, 5.0),
    _freeze("query_replica", 1.5, 5.0),
    # Beyond the life of its pin, and of the lease of its job.
    _freeze("query_replica", 22.0, 28.0, weight=0, soak_weight=2, name="starve_query_replica"),
    _freeze("job", 5.5, 9.0, weight=0, soak_weight=3),
    _freeze("query_child", 1.0, 3.0),
    _freeze("serve_controller", 2.0, 8.0),
    _freeze("haproxy", 1.0, 3.0),
    _freeze("backend", 1.5, 5.0, weight=2),
    _freeze("postmaster", 1.5, 4.0),
    # Other signals.
    Kind("reload_haproxy", Group.SIGNAL, "haproxy"),
    Kind("restart_postgres_fast", Group.SIGNAL, "postmaster"),
    Kind("restart_postgres_immediate", Group.SIGNAL, "postmaster"),
    # Connections.
    Kind("end_backend", Group.SESSIONS, weight=1, kill_weight=10, soak_weight=4),
    Kind("end_backends", Group.SESSIONS, weight=2, soak_weight=2, hold_s=(1.5, 4.0)),
    Kind("full_pool", Group.SESSIONS, weight=2, hold_s=(3.0, 6.0)),
    Kind("held_tables", Group.SESSIONS, soak_weight=1, hold_s=(5.0, 15.0)),
    Kind("held_head", Group.SESSIONS, soak_weight=1, hold_s=(0.5, 2.5)),
    # Disks.
    Kind("full_objects", Group.DISK, weight=2, hold_s=(2.0, 5.0), needs=frozenset({Need.ROOT})),
    Kind("objects_away", Group.DISK, weight=2, hold_s=(1.5, 4.0)),
    Kind("full_data", Group.DISK, hold_s=(1.5, 4.0), placements=_TOGETHER,
         needs=frozenset({Need.ROOT, Need.OWN_DISK})),
    # The way to PostgreSQL.
    Kind("lost_publish_replies", Group.NETWORK, placements=_APART, weight=2, soak_weight=1,
         hold_s=(3.0, 8.0)),
    Kind("lost_swap_replies", Group.NETWORK, placements=_APART, weight=0, soak_weight=2,
         hold_s=(3.0, 8.0)),
    Kind("lost_append_replies", Group.NETWORK, placements=_APART, weight=2, hold_s=(3.0, 8.0)),
    Kind("lost_replies", Group.NETWORK, placements=_APART, weight=2, soak_weight=1,
         hold_s=(3.0, 8.0)),
    Kind("partition", Group.NETWORK, placements=_APART, weight=2, soak_weight=1,
         hold_s=(2.0, 6.0)),
    Kind("black_hole", Group.NETWORK, placements=_APART, hold_s=(2.0, 5.0)),
    Kind("reset_connections", Group.NETWORK, placements=_APART),
    Kind("slow_network", Group.NETWORK, placements=_APART, hold_s=(3.0, 8.0)),
    # Nodes: the GCS takes a silent one for dead and starts its actors elsewhere.
    _node("freeze_node", 8.0, 12.0, weight=3),
    _node("freeze_raylet", 8.0, 12.0, weight=3),
    _node("kill_node", 0.0, 0.0, weight=1),
)
# fmt: on

BY_NAME = {kind.name: kind for kind in KINDS}


def available(
    placement: Placement,
    *,
    offers: Iterable[Need] = (),
    kills: bool = False,
    maintenance: bool = False,
) -> tuple[Kind, ...]:
    """The kinds that can be done, in the order of the table."""

    offered = frozenset(offers)
    return tuple(
        kind
        for kind in KINDS
        if placement in kind.placements
        and kind.needs <= offered
        and cards_of(kind, kills=kills, maintenance=maintenance) > 0
    )


def cards_of(kind: Kind, *, kills: bool = False, maintenance: bool = False) -> int:
    """How many cards a kind has in the deck of such a run."""

    if maintenance:
        return kind.soak_weight
    return kind.kill_weight if kills else kind.weight
