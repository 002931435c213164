"""Every test of the suite, for a backend's test module to import with a star."""

from tests.conformance.bus import *  # noqa: F403
from tests.conformance.catalog import *  # noqa: F403
from tests.conformance.creating import *  # noqa: F403
from tests.conformance.deletes import *  # noqa: F403
from tests.conformance.door import *  # noqa: F403
from tests.conformance.erasures import *  # noqa: F403
from tests.conformance.failure import *  # noqa: F403
from tests.conformance.jobs import *  # noqa: F403
from tests.conformance.keys import *  # noqa: F403
from tests.conformance.leases import *  # noqa: F403
from tests.conformance.nested import *  # noqa: F403
from tests.conformance.partitions import *  # noqa: F403
from tests.conformance.publication import *  # noqa: F403
from tests.conformance.publication_time import *  # noqa: F403
from tests.conformance.querying import *  # noqa: F403
from tests.conformance.reading import *  # noqa: F403
from tests.conformance.restart import *  # noqa: F403
from tests.conformance.restore import *  # noqa: F403
from tests.conformance.sql_surface import *  # noqa: F403
from tests.conformance.upkeep import *  # noqa: F403
from tests.conformance.upkeep_files import *  # noqa: F403
from tests.conformance.write_intents import *  # noqa: F403
