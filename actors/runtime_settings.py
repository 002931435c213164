"""Which actors a stack has, and what each of their processes is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from actors.code_version import code_version
from actors.roles import ALL_ROLES, Role

if TYPE_CHECKING:
    from actors.handles import RoleHandle

CORE = "core"


@dataclass(frozen=True, slots=True)
class RuntimeSettings:
    """What every process of a stack has to know to find and make the roles.

    :param factory: `module:function`, see `actors.backend`.
    :param config: path of the settings file handed to the factory.
    :param env: environment of the actors beyond what Ray's processes have; shown by Ray, so never
        a secret.
    :param job_idle_s: a process of jobs ends when it had none for so long.
    :param tick_age_s_max: a role whose loops stand still for so long is ended and replaced.
    """

    namespace: str
    factory: str
    config: str
    placement: Literal["together", "spread"] = "together"
    coordinators: int = 1
    tick_age_s_max: float = 30.0
    stop_s_max: float = 15.0
    log_level: str = "INFO"
    job_idle_s: float = 90.0
    version: str = field(default_factory=code_version)
    env: Mapping[str, str] = field(default_factory=dict)

    def roles(self) -> dict[str, frozenset[Role]]:
        """The wanted actors by role name, in the order in which they are started; the first one is
        the root."""

        if self.placement == "together":
            return {CORE: ALL_ROLES}
        single = (Role.SUPERVISOR, Role.LEASE_MANAGER, Role.PUBLISHER, Role.MAINTENANCE)
        wanted = {role.value: frozenset({role}) for role in single}
        for number in range(self.coordinators):
            wanted[f"{Role.COORDINATOR}-{number}"] = frozenset({Role.COORDINATOR})
        return wanted

    @property
    def root(self) -> str:
        return next(iter(self.roles()))

    def handle(self, role: str) -> RoleHandle:
        from actors.handles import ActorAddress, RoleHandle  # with Ray

        return RoleHandle(ActorAddress(self.namespace, role, self.version))
