-- append_group: one group commit on one shard, as one server-side batch.
--
-- Why it is safe:
-- * Everything happens in the transaction of one call, so no client pause can hold a lock (B11).
-- * Two advisory locks are held shared: the ring fence (rotation takes it exclusively for an
--   instant, so no key is ever inserted into two generations and no segment into a ring that is
--   being left) and one per table (a schema change takes it exclusively, so the version checked
--   here is current when the entry commits, A12). Each statement below has its own snapshot
--   (READ COMMITTED), taken after the locks.
-- * Keys are inserted sorted, so two groups with the same keys never deadlock; the loser waits for
--   the winner's commit and then reads its record (A5).
-- * A refused entry leaves nothing: keys are inserted only for entries that passed every check, and
--   positions are given only to entries whose key was won (A9, A11).
-- * The counter is updated last, so the shard is locked for one small update, one narrow insert and
--   the commit. Positions are therefore dense and in commit order (A7).
--
-- Arrays are parallel, one element an entry, except p_ref_* (one element an entry and table).
-- Status: 0 accepted, 1 key taken, 2 schema stale or table closed, 3 backpressure, 4 expired.
CREATE OR REPLACE FUNCTION append_group(
    p_shard integer,
    p_principals integer[],
    p_targets text[],
    p_keys bytea[],
    p_fingerprints bytea[],
    p_schema_versions text[],
    p_first_attempts timestamptz[],
    p_row_counts integer[],
    p_reject_counts integer[],
    p_entry_indexes bytea[],
    p_entry_bytes integer[],
    p_ref_entries smallint[],
    p_ref_tables integer[],
    p_ref_versions integer[],
    p_payload bytea,
    p_payload_key text,
    p_payload_intent uuid,
    p_reject_entries smallint[],
    p_reject_tables integer[],
    p_reject_rows integer[],
    p_reject_documents bytea[],
    p_window interval,
    p_backlog_bytes_hard bigint,
    OUT statuses smallint[],
    OUT stale_tables integer[],
    OUT lo bigint,
    OUT accepted_at timestamptz,
    OUT expires_at timestamptz,
    OUT history_serial integer
) LANGUAGE plpgsql AS $$
DECLARE
    v_state bus_state;
    v_segment bigint;
    v_group_bytes bigint;
    v_count integer;
    v_key_count integer;
    v_won bytea[];
    v_intents integer;
BEGIN
    PERFORM pg_advisory_xact_lock_shared(7201, 0);
    PERFORM pg_advisory_xact_lock_shared(7202, t.table_id)
        FROM (SELECT DISTINCT unnest(p_ref_tables) AS table_id ORDER BY 1) t;
    -- failpoint: append_group.after_locks
    SELECT * INTO v_state FROM bus_state;
    statuses := array_fill(0::smallint, ARRAY[cardinality(p_targets)]);

    v_key_count := cardinality(array_remove(p_keys, NULL));
    IF v_key_count > 0 THEN
        SELECT coalesce(array_agg(CASE WHEN i.key_hash IS NULL THEN 0 ELSE 1 END::smallint
                                  ORDER BY k.n), statuses)
          INTO statuses
          FROM unnest(p_keys) WITH ORDINALITY AS k (key_hash, n)
          LEFT JOIN idem i ON i.key_hash = k.key_hash;
    END IF;

    SELECT array_agg(DISTINCT r.table_id) INTO stale_tables
      FROM unnest(p_ref_tables, p_ref_versions) AS r (table_id, version)
      LEFT JOIN lake_table t
        ON t.table_id = r.table_id AND t.version = r.version AND t.state = 'open'
     WHERE t.table_id IS NULL;
    IF stale_tables IS NOT NULL THEN
        SELECT array_agg(CASE WHEN s.status = 0 AND EXISTS (
                   SELECT 1 FROM unnest(p_ref_entries, p_ref_tables, p_ref_versions)
                                 AS r (entry, table_id, version)
                     LEFT JOIN lake_table t
                       ON t.table_id = r.table_id AND t.version = r.version AND t.state = 'open'
                    WHERE r.entry = s.n AND t.table_id IS NULL)
               THEN 2 ELSE s.status END::smallint ORDER BY s.n)
          INTO statuses FROM unnest(statuses) WITH ORDINALITY AS s (status, n);
    END IF;

    IF cardinality(array_remove(p_first_attempts, NULL)) > 0 THEN
        SELECT array_agg(CASE WHEN s.status = 0
                               AND p_first_attempts[s.n] < clock_timestamp() - p_window
                         THEN 4 ELSE s.status END::smallint ORDER BY s.n)
          INTO statuses FROM unnest(statuses) WITH ORDINALITY AS s (status, n);
    END IF;

    IF (SELECT b.appended_bytes - d.terminal_bytes >= p_backlog_bytes_hard
          FROM bus_shard b JOIN bus_done d USING (shard) WHERE shard = p_shard) THEN
        statuses := array_replace(statuses, 0::smallint, 3::smallint);
    END IF;
    IF NOT 0 = ANY (statuses) THEN
        RETURN;
    END IF;

    v_segment := nextval('segment_number');
    -- failpoint: append_group.before_keys
    IF v_key_count > 0 THEN
        IF v_state.key_ring = 0 THEN
            WITH won AS (
                INSERT INTO idem_0 SELECT p_keys[s.n], p_fingerprints[s.n], v_segment, s.n,
                                          p_schema_versions[s.n]
                  FROM unnest(statuses) WITH ORDINALITY AS s (status, n)
                 WHERE s.status = 0 AND p_keys[s.n] IS NOT NULL ORDER BY p_keys[s.n]
                ON CONFLICT DO NOTHING RETURNING key_hash)
            SELECT array_agg(key_hash) INTO v_won FROM won;
        ELSIF v_state.key_ring = 1 THEN
            WITH won AS (
                INSERT INTO idem_1 SELECT p_keys[s.n], p_fingerprints[s.n], v_segment, s.n,
                                          p_schema_versions[s.n]
                  FROM unnest(statuses) WITH ORDINALITY AS s (status, n)
                 WHERE s.status = 0 AND p_keys[s.n] IS NOT NULL ORDER BY p_keys[s.n]
                ON CONFLICT DO NOTHING RETURNING key_hash)
            SELECT array_agg(key_hash) INTO v_won FROM won;
        ELSE
            WITH won AS (
                INSERT INTO idem_2 SELECT p_keys[s.n], p_fingerprints[s.n], v_segment, s.n,
                                          p_schema_versions[s.n]
                  FROM unnest(statuses) WITH ORDINALITY AS s (status, n)
                 WHERE s.status = 0 AND p_keys[s.n] IS NOT NULL ORDER BY p_keys[s.n]
                ON CONFLICT DO NOTHING RETURNING key_hash)
            SELECT array_agg(key_hash) INTO v_won FROM won;
        END IF;
        SELECT array_agg(CASE WHEN s.status = 0 AND p_keys[s.n] IS NOT NULL
                               AND NOT p_keys[s.n] = ANY (coalesce(v_won, '{}'))
                         THEN 1 ELSE s.status END::smallint ORDER BY s.n)
          INTO statuses FROM unnest(statuses) WITH ORDINALITY AS s (status, n);
    END IF;

    -- failpoint: append_group.after_keys
    SELECT count(*), sum(p_entry_bytes[s.n]) INTO v_count, v_group_bytes
      FROM unnest(statuses) WITH ORDINALITY AS s (status, n) WHERE s.status = 0;
    IF v_count = 0 THEN
        RETURN;
    END IF;

    IF p_payload_key IS NOT NULL THEN
        -- The object was written under this intent; whichever of collection and append commits
        -- first wins (C6). A lost intent means the object may be gone: nothing is appended.
        DELETE FROM write_intent WHERE file_id = p_payload_intent;
        GET DIAGNOSTICS v_intents = ROW_COUNT;
        IF v_intents = 0 THEN
            RAISE EXCEPTION 'the write intent of the payload is gone' USING ERRCODE = 'LB001';
        END IF;
    ELSIF v_state.segment_ring = 0 THEN
        INSERT INTO bus_segment_0 VALUES (v_segment, p_payload);
    ELSIF v_state.segment_ring = 1 THEN
        INSERT INTO bus_segment_1 VALUES (v_segment, p_payload);
    ELSIF v_state.segment_ring = 2 THEN
        INSERT INTO bus_segment_2 VALUES (v_segment, p_payload);
    ELSE
        INSERT INTO bus_segment_3 VALUES (v_segment, p_payload);
    END IF;

    -- failpoint: append_group.after_segment
    SELECT l.history_serial INTO history_serial FROM lake l;
    UPDATE bus_shard b
       SET next_append = b.next_append + v_count, appended_bytes = b.appended_bytes + v_group_bytes
     WHERE b.shard = p_shard RETURNING b.next_append - v_count INTO lo;
    -- failpoint: append_group.after_counter
    accepted_at := clock_timestamp();
    expires_at := accepted_at + p_window;

    INSERT INTO bus_log
    SELECT p_shard, append_group.lo, append_group.lo + v_count, v_segment, v_state.segment_ring,
           v_state.key_ring, p_payload_key, append_group.history_serial, append_group.accepted_at,
           append_group.expires_at,
           array_agg(s.n::smallint ORDER BY s.n), array_agg(p_entry_indexes[s.n] ORDER BY s.n),
           array_agg(p_entry_bytes[s.n] ORDER BY s.n), array_agg(p_principals[s.n] ORDER BY s.n),
           array_agg(p_targets[s.n] ORDER BY s.n), array_agg(p_row_counts[s.n] ORDER BY s.n),
           array_agg(p_reject_counts[s.n] ORDER BY s.n),
           (SELECT coalesce(array_agg(DISTINCT r.table_id), '{}')
              FROM unnest(p_ref_entries, p_ref_tables) AS r (entry, table_id)
             WHERE statuses[r.entry] = 0)
      FROM unnest(statuses) WITH ORDINALITY AS s (status, n) WHERE s.status = 0;

    -- failpoint: append_group.after_log
    IF cardinality(p_reject_entries) > 0 THEN
        INSERT INTO bus_quarantine (kind, history_serial, shard, position, principal_id, target,
                                    table_ids, rows, reason, attempts, by_crash, created_at, payload)
        SELECT 'rejects', append_group.history_serial, p_shard,
               append_group.lo + (SELECT count(*) FROM unnest(statuses[1:r.entry - 1]) AS e (status)
                                   WHERE e.status = 0),
               p_principals[r.entry], p_targets[r.entry], ARRAY[r.table_id], r.row_count,
               'rows did not fit the table', 0, false, append_group.accepted_at, r.document
          FROM unnest(p_reject_entries, p_reject_tables, p_reject_rows, p_reject_documents)
               AS r (entry, table_id, row_count, document)
         WHERE statuses[r.entry] = 0;
    END IF;
    -- failpoint: append_group.after_rejects
END $$;
