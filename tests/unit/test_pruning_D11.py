"""D11: the answer with pruning on is the answer with pruning off, and is right.

Every query runs three times: over all files, over the files that pruning keeps, and over a plain
DuckDB table of the same values (which knows neither our files' footers nor our statistics). The
seed of a failing world is in the message; LAKEBUS_PRUNING_WORLDS sets how many worlds are tried.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import duckdb
import pytest

from lakebus.snapshots import DataFile
from storage.files.parquet import scan_expression
from storage.files.pruning import prune, table_predicates
from tests.unit.pruning_worlds import World, equality, make_world, predicate

WORLDS = int(os.environ.get("LAKEBUS_PRUNING_WORLDS", "48"))
BATCHES = 6

#: `{p}`: condition on t, unqualified; `{pt}`, `{pa}`: behind `t.`, `a.`; `{q}`: on s behind `s.`;
#: `{e}`: t's column equals values.
QUERIES = (
    "select * from t where {p}",
    "select * from t where {p}",
    "select * from t where {p} and {pt}",
    "select * from t where {e}",
    "select * from t where {e}",
    "select * from t where {e}",
    "select * from t where {e} and {p}",
    "select * from t where {e} or {e}",
    "select count(*) from t where {e}",
    "from T where {p}",
    "select a.* from t as a where {pa}",
    "select count(*), min(id), max(id) from t where {p}",
    "select count(*) from t where {p} or {p}",
    "select * from t join s on t.id = s.id where {pt} and {q}",
    "select * from t join s on t.id = s.id and {pt} where {q}",
    "select * from t, s where {pt} and {q}",
    "select * from t left join s on t.id = s.id where {pt}",
    "select * from t left join s on t.id = s.id where {q}",
    "select * from t left join s on t.id = s.id and {q}",
    "select * from t left join s on t.id = s.id and {pt}",
    "select * from t left join s on t.id = s.id and {pt} and {q} where {pt}",
    "select * from t right join s on t.id = s.id where {pt} and {q}",
    "select * from t right join s on t.id = s.id and {pt} and {q}",
    "select * from t full join s on t.id = s.id where {pt} or {q}",
    "select * from t full join s on t.id = s.id and {pt} where {q}",
    "select * from t left join s using (id) where id = 2 and {pt}",
    "select * from t right join s using (id) where id = 2",
    "select * from t full join s using (id) where id >= 3",
    "select * from t natural join s where id = 2",
    "select * from t semi join s on t.id = s.id and {q} where {pt}",
    "select * from t anti join s on t.id = s.id and {q} where {pt}",
    "select * from t anti join s on t.id = s.id and {pt}",
    "select * from (select * from t where {p}) x where x.id > 1",
    "select * from (select * from t) t where {p}",
    "with x as (select * from t where {p}) select * from x where id is not null",
    "with t as (select * from t where {p}) select * from t where {p}",
    "with s as (select * from t where {p}) select * from s, t where s.id = t.id and {pt}",
    "with x as (select * from t where {p}) select count(*) from x union all select id from t",
    "select * from t where {p} union all select * from t where {p}",
    "select id from t where {p} except select id from s where {q}",
    "select * from t a join t b on a.id = b.id where {pa}",
    "select * from t a join t on a.id = t.id where {pt} and {pa}",
    "select * from t where id in (select id from s where {q}) and {p}",
    "select * from t where id not in (select id from s where {q} and id is not null) and {p}",
    "select * from t where exists (select 1 from s where s.id = t.id and {q} and {pt})",
    "select * from t where not exists (select 1 from s where s.id = t.id and {q})",
    "select *, (select count(*) from s where s.id = t.id and {q}) from t where {p}",
    "select *, (select max(id) from t where {p}) from s where {q}",
    "select * from s, lateral (select count(*) n from t where t.id = s.id and {pt}) where {q}",
    "select id + 1 as id from t where id = 2",
    "select -id as n from t where n = -2",
    "select id, count(*) from t where {p} group by id having count(*) > 1",
    "select id from t where {p} qualify row_number() over (partition by id order by id) = 1",
    "select distinct id from t where {p}",
    "select x.id from t x(n, id) where x.id is not null",
    "select * from (select id from t order by id) a positional join (select 1) where id = 0",
    "select t.id, s.id from t asof join s on t.id >= s.id where s.id >= 2 and t.id > 1",
    "select t.id, s.id from t asof left join s on t.id >= s.id where s.id <= 2",
    "with recursive r as (select 0 as id union select t.id from r, t where {pt} and t.id > r.id) "
    "select * from r",
    "select case when {p} then 1 else 2 end from t where {pt} is true",
    "select column_name, min, max, count from (summarize select id from t where {p})",
)


class Checker:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.database = duckdb.connect(config={"threads": 2})
        self.database.execute("set timezone = 'UTC'")
        self.failed = self.answered = self.listed = self.pruned = self.by_partition = 0

    def run(self, seed: int) -> None:
        world = make_world(seed, self.folder)
        for name, schema in world.schemas.items():
            columns = ", ".join(f'"{c.name}" {c.type}' for c in schema.columns)
            self.database.execute(f'create or replace table "reference_{name}" ({columns})')
            self.database.register("given", world.rows[name])
            self.database.execute(f'insert into "reference_{name}" from given')
            self.database.unregister("given")
        for number in range(25):
            self.check(world, f"seed {seed}, query {number}")

    def check(self, world: World, label: str) -> None:
        sql = self.query(world)
        parameters = list(world.parameters)
        found = self.database.execute("select json_serialize_sql(?::varchar)", [sql]).fetchone()
        assert found is not None
        tree = json.loads(found[0])
        assert not tree["error"], (label, sql, tree)
        predicates = table_predicates(tree, parameters, world.schemas, world.versions)
        kept = {name: prune(files, predicates[name]) for name, files in world.files.items()}
        self.use_reference(world)
        expected = self.answer(sql, parameters)
        self.use_files(world, world.files)
        unpruned = self.answer(sql, parameters)
        if isinstance(expected, str) or isinstance(unpruned, str):
            # Which of two conditions fails first is open in SQL; what fails is no answer.
            self.failed += 1
            return
        said = f"{label}: {sql} with {parameters!r}"
        assert unpruned == expected, f"files differ from values; {said}"
        if any(len(kept[name]) < len(files) for name, files in world.files.items()):
            self.use_files(world, kept)
            assert self.answer(sql, parameters) == expected, f"pruning shows; {said}"
        self.answered += 1
        self.listed += sum(len(files) for files in world.files.values())
        self.pruned += sum(len(f) - len(kept[name]) for name, f in world.files.items())
        for name, files in world.files.items():
            plain = [dataclasses.replace(file, partition=None) for file in files]
            self.by_partition += len(prune(plain, predicates[name])) - len(kept[name])

    def query(self, world: World) -> str:
        """A template filled from left to right, since parameters are numbered in that order."""

        world.parameters.clear()
        parts = world.random.choice(QUERIES).replace("{", "\1{").replace("}", "}\1").split("\1")
        fill = {
            "{e}": lambda: equality(world, "t"),
            "{p}": lambda: predicate(world, "t"),
            "{pt}": lambda: predicate(world, "t", "t."),
            "{pa}": lambda: predicate(world, "t", "a."),
            "{q}": lambda: predicate(world, "s", "s."),
        }
        return "".join(fill[part]() if part in fill else part for part in parts)

    def use_files(self, world: World, files: dict[str, list[DataFile]]) -> None:
        for name, schema in world.schemas.items():
            paths = [world.path_of[file.file_id] for file in files[name]]
            relation = scan_expression(schema, paths)
            self.database.execute(f'create or replace view "{name}" as from {relation}')

    def use_reference(self, world: World) -> None:
        for name in world.schemas:
            self.database.execute(f'create or replace view "{name}" as from "reference_{name}"')

    def answer(self, sql: str, parameters: list[object]) -> Counter[tuple[str, ...]] | str:
        """The multiset of rows as text, or the kind of failure."""

        try:
            # A cast over the query, because Python cannot hold all of DuckDB's values.
            shown = f"select columns(*)::varchar from ({sql})"
            rows = self.database.execute(shown, parameters).fetchall()
        except duckdb.Error as error:
            return type(error).__name__
        return Counter(tuple(map(repr, row)) for row in rows)


@pytest.fixture(scope="module")
def checker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checker]:
    made = Checker(tmp_path_factory.mktemp("pruning"))
    yield made
    made.database.close()


@pytest.mark.parametrize("batch", range(BATCHES))
def test_D11_pruned_answers_equal_unpruned_and_true_answers(checker: Checker, batch: int) -> None:
    for seed in range(batch, WORLDS, BATCHES):
        checker.run(seed)


def test_D11_worlds_answer_and_prune_enough_to_prove_something(checker: Checker) -> None:
    if not checker.answered:
        pytest.skip("needs the worlds of this module to have run")
    assert checker.answered > 4 * checker.failed
    assert checker.pruned > checker.listed / 10
    assert checker.by_partition > WORLDS / 2  # by the partition alone, where bounds do not help
