-- publish: the single transaction that creates a snapshot.
--
-- Why it is safe:
-- * Lock order is fixed: the head row first, then leases in order of id, then the shards' done rows.
--   Whoever publishes or changes a schema takes the head first, so snapshots form one line (C4).
-- * The fence is here: a commit counts only while its lease row carries its epoch. A lease that
--   expired and was not reclaimed still counts; a reclaimed one changes nothing (B6). Commits that
--   lost are reported and their neighbours are published (A9).
-- * Files, ranges, watermark, the end of the leases and the snapshot are one transaction, and the
--   watermark lives in the head row itself: they become visible together or not at all (C1).
-- * The write intents of a commit's files are consumed here; collection removes an intent before it
--   deletes a file. Whichever commits first wins (C6).
-- * The watermark is the longest prefix of terminal ranges and never decreases (C3).
-- * The time is after every earlier one and after every time already closed (C4).
-- * The whole call is one server-side batch: no paused client holds the head row (B11).
-- * A publication that already happened is answered from its record (C5).
-- What it costs does not depend on how much was published before: every row is found by its key.
CREATE OR REPLACE FUNCTION publish(
    p_publication_id uuid,
    p_commits jsonb,
    p_quarantine_payloads bytea[],
    p_quarantine_max integer,
    p_quarantine_window interval,
    OUT snapshot_id bigint, OUT published_at timestamptz, OUT outcomes jsonb, OUT watermark bigint[]
) LANGUAGE plpgsql AS $$
DECLARE
    v_head lake;
    v_commit jsonb;
    v_outcome text;
    v_outcomes jsonb := '{}';
    v_accepted jsonb[] := '{}';
    v_files uuid[];
    v_leases text[] := '{}';
    v_count bigint;
    v_tables jsonb;
    v_shard integer;
    v_mark bigint;
    v_next bigint;
    v_quarantined bigint;
    v_condemned bigint := 0;
BEGIN
    -- failpoint: publish.before_head_lock
    SELECT * INTO v_head FROM lake FOR UPDATE;
    -- failpoint: publish.after_head_lock
    SELECT s.snapshot_id, s.published_at, s.summary -> 'outcomes', s.watermark
      INTO publish.snapshot_id, publish.published_at, publish.outcomes, publish.watermark
      FROM snapshot s WHERE s.publication_id = p_publication_id;
    IF FOUND THEN
        RETURN;
    END IF;

    -- failpoint: publish.after_record_lookup
    FOR v_commit IN SELECT c FROM jsonb_array_elements(p_commits) c
                     ORDER BY (c ->> 'lease_id')::bigint LOOP
        v_outcome := 'published';
        PERFORM 1 FROM bus_lease b
          WHERE b.lease_id = (v_commit ->> 'lease_id')::bigint
            AND b.epoch = (v_commit ->> 'epoch')::bigint AND b.state = 'leased'
            AND b.shard = (v_commit ->> 'shard')::integer
            AND b.lo = (v_commit ->> 'lo')::bigint AND b.hi = (v_commit ->> 'hi')::bigint
            FOR UPDATE;
        -- failpoint: publish.after_fence
        -- A second commit of one lease in one publication lost it to the first.
        IF NOT FOUND OR v_commit ->> 'lease_id' = ANY (v_leases) THEN
            v_outcome := 'lease_lost';
        ELSE
            SELECT coalesce(array_agg((f ->> 'file_id')::uuid), '{}') INTO v_files
              FROM jsonb_array_elements(v_commit -> 'files') f;
            SELECT count(*) INTO v_count FROM (
                SELECT 1 FROM write_intent w WHERE w.file_id = ANY (v_files)
                 ORDER BY w.file_id FOR UPDATE) locked;
            -- failpoint: publish.after_intent_locks
            IF v_count <> cardinality(v_files) THEN
                v_outcome := 'intent_lost';
            ELSE
                SELECT count(*) INTO v_quarantined
                  FROM jsonb_array_elements(v_commit -> 'quarantined') q
                 WHERE (q ->> 'by_crash')::boolean;
                IF v_quarantined > 0 AND v_condemned + v_quarantined + (
                    SELECT count(*) FROM bus_quarantine b
                     WHERE b.by_crash AND b.created_at > clock_timestamp() - p_quarantine_window
                   ) > p_quarantine_max THEN
                    v_outcome := 'quarantine_stopped';
                ELSE
                    v_condemned := v_condemned + v_quarantined;
                    DELETE FROM write_intent w WHERE w.file_id = ANY (v_files);
                    -- failpoint: publish.after_intents_consumed
                    v_accepted := v_accepted || v_commit;
                    v_leases := v_leases || (v_commit ->> 'lease_id');
                END IF;
            END IF;
        END IF;
        v_outcomes := v_outcomes || jsonb_build_object(v_commit ->> 'commit_id', v_outcome);
    END LOOP;

    -- failpoint: publish.after_outcomes
    outcomes := v_outcomes;
    watermark := v_head.watermark;
    IF cardinality(v_accepted) = 0 THEN
        RETURN;
    END IF;

    snapshot_id := v_head.snapshot_id + 1;
    published_at := greatest(clock_timestamp(), v_head.published_at + interval '1 microsecond',
                             v_head.closed_until + interval '1 microsecond');

    WITH added AS (
        INSERT INTO data_file (file_id, table_id, schema_version, first_snapshot, object_key, rows,
                               size_bytes, sha256, statistics, partition, layout)
        SELECT (f ->> 'file_id')::uuid, (f ->> 'table_id')::integer,
               (f ->> 'schema_version')::integer, publish.snapshot_id, f ->> 'object_key',
               (f ->> 'rows')::bigint, (f ->> 'size_bytes')::bigint, f ->> 'sha256',
               f ->> 'statistics', f ->> 'partition', coalesce(f ->> 'layout', '')
          FROM unnest(v_accepted) c, jsonb_array_elements(c -> 'files') f
        RETURNING table_id, rows, size_bytes),
    by_table AS (
        SELECT table_id, count(*) AS files, sum(rows) AS rows, sum(size_bytes) AS size_bytes
          FROM added GROUP BY table_id)
    SELECT coalesce(jsonb_object_agg(table_id, jsonb_build_object(
               'files_added', files, 'rows_added', rows, 'bytes_added', size_bytes)), '{}')
      INTO v_tables FROM by_table;

    -- failpoint: publish.after_files
    INSERT INTO published_range (shard, lo, hi, snapshot_id, commit_id, owner, published_at)
    SELECT (c ->> 'shard')::integer, (c ->> 'lo')::bigint, (c ->> 'hi')::bigint,
           publish.snapshot_id, (c ->> 'commit_id')::uuid, (c ->> 'owner')::uuid,
           publish.published_at
      FROM unnest(v_accepted) c;

    -- failpoint: publish.after_ranges
    INSERT INTO bus_quarantine (kind, history_serial, shard, position, principal_id, target,
                                table_ids, rows, reason, attempts, by_crash, created_at, payload)
    SELECT 'entry', l.history_serial, l.shard, q.position, l.principals[p.place],
           l.targets[p.place], l.table_ids, l.row_counts[p.place], q.reason, q.attempts,
           q.by_crash, publish.published_at, p_quarantine_payloads[q.payload]
      FROM (SELECT (c ->> 'shard')::integer AS shard, (e ->> 'position')::bigint AS position,
                   e ->> 'reason' AS reason, (e ->> 'attempts')::integer AS attempts,
                   (e ->> 'by_crash')::boolean AS by_crash, (e ->> 'payload')::integer AS payload
              FROM unnest(v_accepted) c
             CROSS JOIN LATERAL jsonb_array_elements(c -> 'quarantined') e) q
     CROSS JOIN LATERAL (SELECT g.* FROM bus_log g WHERE g.shard = q.shard AND g.lo <= q.position
                          ORDER BY g.lo DESC LIMIT 1) l
     CROSS JOIN LATERAL (SELECT (q.position - l.lo + 1)::integer AS place) p
     WHERE l.hi > q.position;

    -- failpoint: publish.after_quarantine
    DELETE FROM bus_lease b WHERE b.lease_id = ANY (v_leases::bigint[]);

    -- failpoint: publish.after_leases
    FOR v_shard, v_count IN
        SELECT (c ->> 'shard')::integer, sum((c ->> 'range_bytes')::bigint)
          FROM unnest(v_accepted) c GROUP BY 1 ORDER BY 1 LOOP
        UPDATE bus_done d SET terminal_bytes = d.terminal_bytes + v_count WHERE d.shard = v_shard;
        -- failpoint: publish.after_done
        v_mark := watermark[v_shard + 1];
        LOOP
            SELECT p.hi INTO v_next FROM published_range p
             WHERE p.shard = v_shard AND p.lo = v_mark;
            EXIT WHEN NOT FOUND;
            v_mark := v_next;
        END LOOP;
        watermark[v_shard + 1] := greatest(watermark[v_shard + 1], v_mark);
    END LOOP;

    -- failpoint: publish.after_watermark
    INSERT INTO snapshot (snapshot_id, parent_id, history_serial, published_at, operation,
                          watermark, summary, publication_id)
    VALUES (publish.snapshot_id, v_head.snapshot_id, v_head.history_serial, publish.published_at,
            'append', publish.watermark,
            jsonb_build_object('tables', v_tables, 'outcomes', v_outcomes), p_publication_id);
    -- failpoint: publish.after_snapshot
    UPDATE lake SET snapshot_id = publish.snapshot_id, published_at = publish.published_at,
                    publish_count = lake.publish_count + 1, watermark = publish.watermark;
    -- failpoint: publish.after_head
    PERFORM pg_notify('lakebus_head', publish.snapshot_id::text);
    -- failpoint: publish.after_notify
END $$;
