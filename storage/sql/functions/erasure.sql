-- Erasure: rows leave every snapshot, also those published before (contract E7, the exception to D8).
--
-- Why it is safe:
-- * A file is exchanged within its own life: the new row takes the first and the last snapshot of
--   the old one as they are in this very transaction, under the head row, so a compaction or a
--   delete comes before it (then its outputs are files like all others, and looked at next) or
--   after it, when the old file is no longer there and it loses.
-- * Advisory lock 7204 comes first, as in collection: the old file is given up here although a
--   snapshot, a tag or a pin names it. That is what erasure means; nothing else may.
-- * What was taken is noted beside it (`erased_file`), so that the counts of snapshots stay provable
--   and answers can tell. The note holds no value of any row.
-- * `lake.erasure_count` grows in the same transaction: whoever remembers files of snapshots reads
--   it after them, and forgets them all when it has grown.
-- * The write intents of new files are consumed as by every publish (C6).

-- begin_erasure: the record of an erasure. Repeating it changes nothing.
CREATE OR REPLACE FUNCTION begin_erasure(p_erasure_id uuid, p_table_id integer) RETURNS void
LANGUAGE sql AS $$
    INSERT INTO erasure (erasure_id, table_id, began_at, owed)
    VALUES (p_erasure_id, p_table_id, clock_timestamp(), false)
    ON CONFLICT ON CONSTRAINT erasure_pkey DO NOTHING
$$;

-- replace_files: files take the place of others within their life. p_replacements: a list of
-- {old, rows, file (null: no row is left), adopted (the file was made in a lost line)}. Answers the
-- old ones whose place was taken; the others are gone already, or the intent of their file is.
CREATE OR REPLACE FUNCTION replace_files(
    p_erasure_id uuid, p_table_id integer, p_replacements jsonb
) RETURNS uuid[] LANGUAGE plpgsql AS $$
DECLARE
    v_head lake;
    v_one jsonb;
    v_old data_file;
    v_file jsonb;
    v_done uuid[] := '{}';
BEGIN
    PERFORM pg_advisory_xact_lock(7204, 0);
    -- failpoint: replace_files.after_lock
    SELECT * INTO v_head FROM lake FOR UPDATE;
    -- failpoint: replace_files.after_head_lock
    FOR v_one IN SELECT r FROM jsonb_array_elements(p_replacements) r LOOP
        SELECT * INTO v_old FROM data_file f
         WHERE f.file_id = (v_one ->> 'old')::uuid AND f.table_id = p_table_id;
        CONTINUE WHEN NOT FOUND;
        v_file := nullif(v_one -> 'file', 'null'::jsonb);
        IF coalesce((v_file ->> 'rows')::bigint, 0) <> v_old.rows - (v_one ->> 'rows')::bigint THEN
            RAISE EXCEPTION 'an erasure of % rows does not leave what was written',
                v_one ->> 'rows' USING ERRCODE = 'data_exception';
        END IF;
        IF v_file IS NOT NULL THEN
            IF NOT (v_one ->> 'adopted')::boolean THEN
                DELETE FROM write_intent w
                 WHERE w.file_id = (v_file ->> 'file_id')::uuid AND w.kind = 'data';
                CONTINUE WHEN NOT FOUND;
            ELSIF EXISTS (SELECT 1 FROM data_file f
                           WHERE f.file_id = (v_file ->> 'file_id')::uuid) THEN
                CONTINUE;
            END IF;
            -- failpoint: replace_files.after_intent
            INSERT INTO data_file (file_id, table_id, schema_version, first_snapshot, last_snapshot,
                                   object_key, rows, size_bytes, sha256, statistics, partition,
                                   layout)
            VALUES ((v_file ->> 'file_id')::uuid, p_table_id,
                    (v_file ->> 'schema_version')::integer, v_old.first_snapshot,
                    v_old.last_snapshot, v_file ->> 'object_key', (v_file ->> 'rows')::bigint,
                    (v_file ->> 'size_bytes')::bigint, v_file ->> 'sha256',
                    v_file ->> 'statistics', v_file ->> 'partition',
                    coalesce(v_file ->> 'layout', ''));
        END IF;
        DELETE FROM data_file f WHERE f.file_id = v_old.file_id;
        -- failpoint: replace_files.after_file
        INSERT INTO erased_file
        VALUES (v_old.file_id, p_erasure_id, p_table_id, v_old.first_snapshot,
                coalesce(v_old.last_snapshot, v_head.snapshot_id + 1), (v_one ->> 'rows')::bigint,
                CASE WHEN v_file IS NULL THEN 1 ELSE 0 END,
                v_old.size_bytes - coalesce((v_file ->> 'size_bytes')::bigint, 0));
        INSERT INTO condemned_file AS c
        VALUES (v_old.file_id, v_old.object_key, p_table_id, 'erased', v_old.size_bytes,
                'deleting', clock_timestamp(), NULL)
        ON CONFLICT ON CONSTRAINT condemned_file_pkey
        DO UPDATE SET state = 'deleting', reason = 'erased', condemned_at = clock_timestamp();
        v_done := v_done || v_old.file_id;
    END LOOP;
    -- failpoint: replace_files.after_files
    IF cardinality(v_done) > 0 THEN
        UPDATE lake SET erasure_count = lake.erasure_count + 1;
    END IF;
    -- failpoint: replace_files.after_count
    RETURN v_done;
END $$;

-- erase_strays: gives up objects that no data file names: those of write intents, which nobody can
-- publish from now on, and those that were condemned already.
CREATE OR REPLACE FUNCTION erase_strays(p_table_id integer, p_file_ids uuid[]) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_advisory_xact_lock(7204, 0);
    -- failpoint: erase_strays.after_lock
    WITH gone AS (
        DELETE FROM write_intent w
         WHERE w.file_id = ANY (p_file_ids) AND w.kind = 'data' AND w.table_id = p_table_id
        RETURNING w.file_id)
    INSERT INTO condemned_file
    SELECT g.file_id, format('tables/%s/%s.parquet', p_table_id, g.file_id), p_table_id, 'erased',
           NULL, 'deleting', clock_timestamp(), NULL
      FROM gone g
    ON CONFLICT ON CONSTRAINT condemned_file_pkey DO NOTHING;
    -- failpoint: erase_strays.after_intents
    UPDATE condemned_file c SET state = 'deleting', reason = 'erased'
     WHERE c.file_id = ANY (p_file_ids) AND c.state <> 'deleted'
       AND NOT EXISTS (SELECT 1 FROM data_file f WHERE f.file_id = c.file_id);
END $$;

-- finish_erasure: the snapshot that tells of it, once. Publishes nothing new for who comes second.
CREATE OR REPLACE FUNCTION finish_erasure(
    p_erasure_id uuid, p_table_id integer, p_publication_id uuid, p_summary jsonb
) RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
    v_snapshot_id bigint;
BEGIN
    PERFORM 1 FROM lake FOR UPDATE;
    SELECT s.snapshot_id INTO v_snapshot_id FROM snapshot s
     WHERE s.publication_id = p_publication_id;
    IF NOT FOUND THEN
        v_snapshot_id := next_snapshot(p_publication_id, 'erase', jsonb_build_object(
            'tables', jsonb_build_object(p_table_id::text, p_summary)));
    END IF;
    -- failpoint: finish_erasure.after_snapshot
    UPDATE erasure e SET ended_at = coalesce(e.ended_at, clock_timestamp())
     WHERE e.erasure_id = p_erasure_id;
    UPDATE lake SET erasures_owed = (
        SELECT coalesce(array_agg(DISTINCT e.table_id), '{}') FROM erasure e
         WHERE e.owed AND e.ended_at IS NULL);
    -- failpoint: finish_erasure.after_end
    RETURN v_snapshot_id;
END $$;

-- owe_erasures: what a line of history that begins anew has to do again before its tables are read.
-- p_records: what the object store holds, as jobs take it. Whoever comes second changes nothing.
CREATE OR REPLACE FUNCTION owe_erasures(p_serial integer, p_records jsonb) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    v_record jsonb;
BEGIN
    PERFORM 1 FROM lake l FOR UPDATE;
    IF NOT EXISTS (SELECT 1 FROM lake l
                    WHERE l.history_serial = p_serial AND l.erasures_serial <> p_serial) THEN
        RETURN;
    END IF;
    FOR v_record IN SELECT r FROM jsonb_array_elements(p_records) r LOOP
        CONTINUE WHEN EXISTS (SELECT 1 FROM erasure e
                               WHERE e.erasure_id = (v_record ->> 'erasure_id')::uuid
                                 AND e.ended_at IS NOT NULL)
                   OR NOT EXISTS (SELECT 1 FROM lake_table t
                                   WHERE t.table_id = (v_record ->> 'table_id')::integer);
        INSERT INTO erasure (erasure_id, table_id, began_at, owed)
        VALUES ((v_record ->> 'erasure_id')::uuid, (v_record ->> 'table_id')::integer,
                clock_timestamp(), true)
        ON CONFLICT ON CONSTRAINT erasure_pkey DO UPDATE SET owed = true;
        INSERT INTO job (job_id, kind, table_id, parameters, dry_run, requested_by, state, attempt,
                         epoch, not_before, created_at, report)
        VALUES (gen_random_uuid(), 'erase', (v_record ->> 'table_id')::integer, v_record, false,
                'restore', 'queued', 0, 0, clock_timestamp(), clock_timestamp(), '{}');
        -- failpoint: owe_erasures.after_job
    END LOOP;
    UPDATE lake SET erasures_serial = p_serial, erasures_owed = (
        SELECT coalesce(array_agg(DISTINCT e.table_id), '{}') FROM erasure e
         WHERE e.owed AND e.ended_at IS NULL);
    -- failpoint: owe_erasures.after_head
END $$;

-- forget_payloads: the claim-check objects of log rows that end at or below these positions and are
-- terminal. Whoever asks for a receipt reads the log row, which stays.
CREATE OR REPLACE FUNCTION forget_payloads(p_positions bigint[]) RETURNS SETOF text
LANGUAGE sql AS $$
    WITH old AS (
        SELECT l.shard, l.lo, l.payload_key FROM bus_log l, lake h
         WHERE l.payload_key IS NOT NULL AND l.hi <= p_positions[l.shard + 1]
           AND l.hi <= h.watermark[l.shard + 1]),
    noted AS (
        INSERT INTO condemned_file (file_id, object_key, reason, state, condemned_at)
        SELECT substring(o.payload_key FROM '^bus/(.*)[.]segment$')::uuid, o.payload_key,
               'payload', 'deleting', clock_timestamp()
          FROM old o
        ON CONFLICT ON CONSTRAINT condemned_file_pkey DO NOTHING)
    UPDATE bus_log l SET payload_key = NULL FROM old o
     WHERE l.shard = o.shard AND l.lo = o.lo
    RETURNING o.payload_key
$$;

-- leave_segments: rotates away from a ring that holds anything, however little and young; the next
-- one has to be empty.
CREATE OR REPLACE FUNCTION leave_segments() RETURNS boolean LANGUAGE plpgsql
SET lock_timeout = '50ms' AS $$
DECLARE
    v_state bus_state;
    v_next integer;
    v_filled boolean;
    v_taken boolean;
BEGIN
    SELECT * INTO v_state FROM bus_state;
    v_next := (v_state.segment_ring + 1) % 4;
    EXECUTE format('SELECT EXISTS (SELECT 1 FROM bus_segment_%s)', v_state.segment_ring)
       INTO v_filled;
    EXECUTE format('SELECT EXISTS (SELECT 1 FROM bus_segment_%s)', v_next) INTO v_taken;
    IF v_taken OR NOT v_filled THEN
        RETURN false;
    END IF;
    -- failpoint: leave_segments.before_fence
    RETURN switch_segments(v_state.segment_ring, v_next);
END $$;
