-- Schema statements. Each publishes a snapshot, so each takes the head row first, exactly as
-- `publish` does, and then excludes appends to its table by the table's advisory lock (A12).

-- next_snapshot: the part all schema statements share: a new head with one summary.
CREATE OR REPLACE FUNCTION next_snapshot(
    p_publication_id uuid, p_operation text, p_summary jsonb
) RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
    v_head lake;
    v_time timestamptz;
BEGIN
    SELECT * INTO v_head FROM lake FOR UPDATE;
    v_time := greatest(clock_timestamp(), v_head.published_at + interval '1 microsecond',
                       v_head.closed_until + interval '1 microsecond');
    INSERT INTO snapshot (snapshot_id, parent_id, history_serial, published_at, operation,
                          watermark, summary, publication_id)
    VALUES (v_head.snapshot_id + 1, v_head.snapshot_id, v_head.history_serial, v_time,
            p_operation, v_head.watermark, p_summary, p_publication_id);
    UPDATE lake SET snapshot_id = v_head.snapshot_id + 1, published_at = v_time,
                    publish_count = lake.publish_count + 1;
    PERFORM pg_notify('lakebus_head', (v_head.snapshot_id + 1)::text);
    RETURN v_head.snapshot_id + 1;
END $$;

-- create_table: a new table with columns 1..n, visible from its own snapshot on.
-- Answers created = false with the live table's id and version when the name is taken.
CREATE OR REPLACE FUNCTION create_table(
    p_name text, p_definition jsonb, p_publication_id uuid,
    OUT created boolean, OUT table_id integer, OUT version integer, OUT snapshot_id bigint
) LANGUAGE plpgsql AS $$
BEGIN
    PERFORM 1 FROM lake FOR UPDATE;
    SELECT t.table_id, t.version, t.first_snapshot
      INTO create_table.table_id, create_table.version, create_table.snapshot_id
      FROM lake_table t WHERE t.name = p_name AND t.state <> 'dropped';
    IF FOUND THEN
        created := false;
        RETURN;
    END IF;
    created := true;
    table_id := nextval('table_number');
    version := 1;
    snapshot_id := next_snapshot(p_publication_id, 'create', jsonb_build_object(
        'tables', jsonb_build_object(table_id::text, jsonb_build_object('created', p_name))));
    INSERT INTO lake_table (table_id, name, state, version, last_column_id, first_snapshot)
    VALUES (create_table.table_id, p_name, 'open', 1,
            jsonb_array_length(p_definition -> 'columns'), create_table.snapshot_id);
    INSERT INTO table_schema (table_id, version, first_snapshot, definition)
    VALUES (create_table.table_id, 1, create_table.snapshot_id, p_definition);
END $$;

-- alter_table: the next version of a schema. Columns with id 0 get ids never used in the table.
-- The advisory lock waits for appends in flight and keeps new ones out until the commit.
CREATE OR REPLACE FUNCTION alter_table(
    p_table_id integer, p_expected_version integer, p_definition jsonb, p_publication_id uuid,
    OUT outcome text, OUT version integer, OUT snapshot_id bigint, OUT definition jsonb
) LANGUAGE plpgsql AS $$
DECLARE
    v_table lake_table;
    v_last integer;
    v_floor integer;
    v_columns jsonb := '[]';
    v_column jsonb;
BEGIN
    PERFORM 1 FROM lake FOR UPDATE;
    PERFORM pg_advisory_xact_lock(7202, p_table_id);
    SELECT * INTO v_table FROM lake_table t WHERE t.table_id = p_table_id AND t.state = 'open';
    IF NOT FOUND THEN
        outcome := 'not_found';
        RETURN;
    ELSIF v_table.version <> p_expected_version THEN
        outcome := 'version';
        version := v_table.version;
        RETURN;
    END IF;
    -- Versions and column ids begin anew far above in each line of history: a lost line may have
    -- given the next ones to something else, and processes remember schemas by them (F3).
    SELECT (l.history_serial - 1) * 10000 INTO v_floor FROM lake l;
    v_last := greatest(v_table.last_column_id, v_floor);
    FOR v_column IN SELECT c FROM jsonb_array_elements(p_definition -> 'columns') c LOOP
        IF (v_column ->> 'column_id')::integer = 0 THEN
            v_last := v_last + 1;
            v_column := jsonb_set(v_column, '{column_id}', to_jsonb(v_last));
        END IF;
        v_columns := v_columns || v_column;
    END LOOP;
    outcome := 'altered';
    version := greatest(v_table.version, v_floor) + 1;
    definition := jsonb_set(p_definition, '{columns}', v_columns);
    snapshot_id := next_snapshot(p_publication_id, 'alter', jsonb_build_object('tables',
        jsonb_build_object(p_table_id::text, jsonb_build_object('version', version))));
    UPDATE table_schema s SET last_snapshot = alter_table.snapshot_id
     WHERE s.table_id = p_table_id AND s.version = v_table.version;
    INSERT INTO table_schema (table_id, version, first_snapshot, definition)
    VALUES (p_table_id, alter_table.version, alter_table.snapshot_id, alter_table.definition);
    UPDATE lake_table t SET version = alter_table.version, last_column_id = v_last
     WHERE t.table_id = p_table_id;
END $$;

-- begin_drop: closes the table at the door and notes the ends of all shards: entries accepted
-- before it lie below them. Repeating it gives the first ticket again.
CREATE OR REPLACE FUNCTION begin_drop(
    p_name text, OUT table_id integer, OUT positions bigint[]
) LANGUAGE plpgsql AS $$
DECLARE
    v_id integer;
BEGIN
    SELECT t.table_id INTO v_id FROM lake_table t WHERE t.name = p_name AND t.state <> 'dropped';
    IF NOT FOUND THEN
        RETURN;
    END IF;
    PERFORM pg_advisory_xact_lock(7202, v_id);
    UPDATE lake_table t SET state = 'closing', closing_positions =
        (SELECT array_agg(s.next_append ORDER BY s.shard) FROM bus_shard s)
     WHERE t.table_id = v_id AND t.state = 'open';
    SELECT t.table_id, t.closing_positions INTO begin_drop.table_id, begin_drop.positions
      FROM lake_table t WHERE t.table_id = v_id;
END $$;

-- finish_drop: publishes the drop once everything accepted before it is terminal.
-- outcome: dropped (now or before), pending (entries are not terminal yet), not_found.
CREATE OR REPLACE FUNCTION finish_drop(
    p_table_id integer, p_publication_id uuid, OUT outcome text, OUT snapshot_id bigint
) LANGUAGE plpgsql AS $$
DECLARE
    v_head lake;
    v_table lake_table;
    v_rows numeric;
    v_files bigint;
BEGIN
    SELECT * INTO v_head FROM lake FOR UPDATE;
    SELECT * INTO v_table FROM lake_table t WHERE t.table_id = p_table_id;
    IF NOT FOUND OR v_table.state = 'open' THEN
        outcome := 'not_found';
        RETURN;
    ELSIF v_table.state = 'dropped' THEN
        outcome := 'dropped';
        snapshot_id := v_table.last_snapshot;
        RETURN;
    ELSIF EXISTS (SELECT 1 FROM unnest(v_table.closing_positions, v_head.watermark)
                             AS m (needed, reached) WHERE m.reached < m.needed) THEN
        outcome := 'pending';
        RETURN;
    END IF;
    outcome := 'dropped';
    SELECT count(*), coalesce(sum(f.rows), 0) INTO v_files, v_rows FROM data_file f
     WHERE f.table_id = p_table_id AND f.last_snapshot IS NULL;
    snapshot_id := next_snapshot(p_publication_id, 'drop', jsonb_build_object('tables',
        jsonb_build_object(p_table_id::text, jsonb_build_object('dropped', v_table.name,
            'files_removed', v_files, 'rows_removed', v_rows))));
    UPDATE data_file f SET last_snapshot = finish_drop.snapshot_id
     WHERE f.table_id = p_table_id AND f.last_snapshot IS NULL;
    UPDATE table_schema s SET last_snapshot = finish_drop.snapshot_id
     WHERE s.table_id = p_table_id AND s.last_snapshot IS NULL;
    UPDATE lake_table t SET state = 'dropped', last_snapshot = finish_drop.snapshot_id
     WHERE t.table_id = p_table_id;
END $$;

-- close_time: makes sure that no later publish can get a time at or before p_time (C4). Taking the
-- head row waits for a publish in flight; closed_until binds all later ones even if the clock steps
-- back. Answers false when the time lies in the future.
CREATE OR REPLACE FUNCTION close_time(p_time timestamptz) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
    v_head lake;
BEGIN
    SELECT * INTO v_head FROM lake;
    IF p_time <= greatest(v_head.published_at, v_head.closed_until) THEN
        RETURN true;
    END IF;
    SELECT * INTO v_head FROM lake FOR UPDATE;
    IF p_time <= greatest(v_head.published_at, v_head.closed_until) THEN
        RETURN true;
    ELSIF p_time > clock_timestamp() THEN
        RETURN false;
    END IF;
    UPDATE lake SET closed_until = p_time;
    RETURN true;
END $$;
