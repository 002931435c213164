"""Importing this, before anything of the product, switches failpoints on in the tests' process."""

from __future__ import annotations

from tests.failpoints import hook, points

hook.install()
points.forbid_crash()
