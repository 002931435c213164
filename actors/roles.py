"""The roles of a stack, by name."""

from __future__ import annotations

from enum import StrEnum


class Role(StrEnum):
    LEASE_MANAGER = "lease_manager"
    COORDINATOR = "coordinator"
    PUBLISHER = "publisher"
    SUPERVISOR = "supervisor"
    MAINTENANCE = "maintenance"


ALL_ROLES = frozenset(Role)
