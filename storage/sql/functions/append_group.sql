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
-- Keys and tables are looked up by their values, in the index: a plan that joins them, made while a
-- generation was small, would read all its keys for each group later.
--
-- Beginning a statement costs as much as a few rows, so what a group nearly always is (no key known,
-- one table, nothing refused) is found out by few of them, and by expressions, which are none.
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
    v_segment_ring integer;
    v_key_ring integer;
    v_serial integer;
    v_is_full boolean;
    v_segment bigint;
    v_ordinals smallint[];
    v_count integer;
    v_key_count integer := cardinality(array_remove(p_keys, NULL));
    v_won integer;
    v_intents integer;
    v_lock text;  -- always empty: an expression needs somewhere to go
    v_one_table boolean := p_ref_tables[1] = ALL (p_ref_tables);
    v_tables integer[] := p_ref_tables[1:1];
    v_table integer;
    v_known boolean;
    v_current boolean;
BEGIN
    v_lock := pg_advisory_xact_lock_shared(7201, 0);
    IF NOT v_one_table THEN
        v_tables := ARRAY(SELECT DISTINCT unnest(p_ref_tables) ORDER BY 1);
    END IF;
    FOREACH v_table IN ARRAY v_tables LOOP
        v_lock := pg_advisory_xact_lock_shared(7202, v_table);
    END LOOP;
    -- failpoint: append_group.after_locks
    SELECT s.segment_ring, s.key_ring, l.history_serial,
           b.appended_bytes - d.terminal_bytes >= p_backlog_bytes_hard,
           v_key_count > 0 AND EXISTS (SELECT 1 FROM idem WHERE idem.key_hash = ANY (p_keys)),
           v_one_table AND EXISTS (SELECT 1 FROM lake_table t
                                    WHERE t.table_id = p_ref_tables[1] AND t.state = 'open'
                                      AND t.version = ALL (p_ref_versions))
      INTO v_segment_ring, v_key_ring, v_serial, v_is_full, v_known, v_current
      FROM bus_state s, lake l, bus_shard b, bus_done d
     WHERE b.shard = p_shard AND d.shard = p_shard;
    statuses := array_fill(0::smallint, ARRAY[cardinality(p_targets)]);
    IF v_known THEN
        SELECT array_agg(CASE WHEN i.taken THEN 1 ELSE 0 END::smallint ORDER BY k.n)
          INTO statuses
          FROM unnest(p_keys) WITH ORDINALITY AS k (key_hash, n)
          LEFT JOIN LATERAL (SELECT true AS taken FROM idem
                              WHERE idem.key_hash = k.key_hash LIMIT 1) i ON true;
    END IF;
    IF NOT v_current THEN
        SELECT array_agg(DISTINCT r.table_id) INTO stale_tables
          FROM (SELECT DISTINCT u.table_id, u.version
                  FROM unnest(p_ref_tables, p_ref_versions) AS u (table_id, version)) r
          LEFT JOIN LATERAL (SELECT t.table_id FROM lake_table t
                              WHERE t.table_id = r.table_id AND t.version = r.version
                                AND t.state = 'open' LIMIT 1) t ON true
         WHERE t.table_id IS NULL;
    END IF;
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

    IF v_is_full THEN
        statuses := array_replace(statuses, 0::smallint, 3::smallint);
    END IF;
    IF NOT 0 = ANY (statuses) THEN
        RETURN;
    END IF;

    v_segment := nextval('segment_number');
    -- failpoint: append_group.before_keys
    IF v_key_count > 0 THEN
        IF v_key_ring = 0 THEN
            INSERT INTO idem_0 SELECT k.key_hash, k.fingerprint, v_segment, k.n, k.versions
              FROM unnest(p_keys, p_fingerprints, p_schema_versions, statuses) WITH ORDINALITY
                   AS k (key_hash, fingerprint, versions, status, n)
             WHERE k.status = 0 AND k.key_hash IS NOT NULL ORDER BY k.key_hash
            ON CONFLICT DO NOTHING;
        ELSIF v_key_ring = 1 THEN
            INSERT INTO idem_1 SELECT k.key_hash, k.fingerprint, v_segment, k.n, k.versions
              FROM unnest(p_keys, p_fingerprints, p_schema_versions, statuses) WITH ORDINALITY
                   AS k (key_hash, fingerprint, versions, status, n)
             WHERE k.status = 0 AND k.key_hash IS NOT NULL ORDER BY k.key_hash
            ON CONFLICT DO NOTHING;
        ELSE
            INSERT INTO idem_2 SELECT k.key_hash, k.fingerprint, v_segment, k.n, k.versions
              FROM unnest(p_keys, p_fingerprints, p_schema_versions, statuses) WITH ORDINALITY
                   AS k (key_hash, fingerprint, versions, status, n)
             WHERE k.status = 0 AND k.key_hash IS NOT NULL ORDER BY k.key_hash
            ON CONFLICT DO NOTHING;
        END IF;
        GET DIAGNOSTICS v_won = ROW_COUNT;
        -- Fewer: some were refused before, or lost their key to who committed meanwhile.
        IF v_won < v_key_count THEN
            SELECT array_agg(CASE WHEN s.status = 0 AND p_keys[s.n] IS NOT NULL
                                   AND (SELECT i.segment_id FROM idem i
                                         WHERE i.key_hash = p_keys[s.n] LIMIT 1)
                                       IS DISTINCT FROM v_segment
                             THEN 1 ELSE s.status END::smallint ORDER BY s.n)
              INTO statuses FROM unnest(statuses) WITH ORDINALITY AS s (status, n);
        END IF;
    END IF;

    -- failpoint: append_group.after_keys
    v_ordinals := array_positions(statuses, 0::smallint);
    v_count := cardinality(v_ordinals);
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
    ELSIF v_segment_ring = 0 THEN
        INSERT INTO bus_segment_0 VALUES (v_segment, p_payload);
    ELSIF v_segment_ring = 1 THEN
        INSERT INTO bus_segment_1 VALUES (v_segment, p_payload);
    ELSIF v_segment_ring = 2 THEN
        INSERT INTO bus_segment_2 VALUES (v_segment, p_payload);
    ELSE
        INSERT INTO bus_segment_3 VALUES (v_segment, p_payload);
    END IF;

    -- failpoint: append_group.after_segment
    history_serial := v_serial;
    UPDATE bus_shard b
       SET next_append = b.next_append + v_count,
           appended_bytes = b.appended_bytes + (
               SELECT sum(e.size) FROM unnest(p_entry_bytes, statuses) AS e (size, status)
                WHERE e.status = 0)
     WHERE b.shard = p_shard RETURNING b.next_append - v_count INTO lo;
    -- failpoint: append_group.after_counter
    accepted_at := clock_timestamp();
    expires_at := accepted_at + p_window;

    IF v_count = cardinality(statuses) THEN  -- nearly always: the arrays go in as they came
        INSERT INTO bus_log VALUES (
            p_shard, append_group.lo, append_group.lo + v_count, v_segment, v_segment_ring,
            v_key_ring, p_payload_key, v_serial, append_group.accepted_at, append_group.expires_at,
            v_ordinals, p_entry_indexes, p_entry_bytes, p_principals, p_targets, p_row_counts,
            p_reject_counts, v_tables);
    ELSE
        INSERT INTO bus_log
        SELECT p_shard, append_group.lo, append_group.lo + v_count, v_segment, v_segment_ring,
               v_key_ring, p_payload_key, v_serial, append_group.accepted_at,
               append_group.expires_at, v_ordinals,
               array_agg(p_entry_indexes[s.n] ORDER BY s.n),
               array_agg(p_entry_bytes[s.n] ORDER BY s.n),
               array_agg(p_principals[s.n] ORDER BY s.n),
               array_agg(p_targets[s.n] ORDER BY s.n), array_agg(p_row_counts[s.n] ORDER BY s.n),
               array_agg(p_reject_counts[s.n] ORDER BY s.n),
               (SELECT coalesce(array_agg(DISTINCT r.table_id), '{}')
                  FROM unnest(p_ref_entries, p_ref_tables) AS r (entry, table_id)
                 WHERE statuses[r.entry] = 0)
          FROM unnest(statuses) WITH ORDINALITY AS s (status, n) WHERE s.status = 0;
    END IF;

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
