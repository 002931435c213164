-- Collection: how a file's life ends (E3, E4). Unreferenced, condemned, deleting, deleted.
--
-- Why it is safe:
-- * Only begin_deletes decides. It holds advisory lock 7204 exclusively while it looks again and
--   removes the row by which a file could be found; pins, tags and expiry hold it too, so each of
--   them comes before the look and is seen, or after it and is refused.
-- * An orphan's write intent goes in the transaction that condemns it. A publish that has the intent
--   locked is passed over; one that comes later finds no intent and publishes nothing (C6).
-- * The object is deleted by the job after the commit. A crash in between leaves `deleting`, which
--   every later run is answered again. Nothing that anybody can still read is ever in that state.
-- * Every step takes at most as much as it is told, and shows with a dry run, which decides nothing
--   and so locks nothing, what it would do (E5). The caller asks for a few thousand at once: a pin
--   that waits for the lock waits for one such step.
-- * Each call plans anew: a plan kept from when few files were condemned would look at all of them
--   for each file (20,000 files: 2.5 s instead of 0.1 s). It may read whole tables, unlike most that
--   the sessions which call it do.

-- unneeded_files: data files that no retained snapshot, tag or pin needs. The time is the
-- statement's: earlier than the lock, so a pin is at worst taken to live a moment longer. The lowest
-- floor of all pins is looked for once, and a file that ended with it or before is below them all.
CREATE OR REPLACE FUNCTION unneeded_files() RETURNS TABLE (
    file_id uuid, table_id integer, object_key text, size_bytes bigint, last_snapshot bigint
) LANGUAGE sql STABLE AS $$
    WITH live AS MATERIALIZED (
        SELECT p.floor, p.snapshot_ids FROM pin p
         WHERE p.expires_at IS NULL OR p.expires_at > statement_timestamp()),
    named AS MATERIALIZED (SELECT DISTINCT unnest(snapshot_ids) AS id FROM live)
    SELECT f.file_id, f.table_id, f.object_key, f.size_bytes, f.last_snapshot FROM data_file f
     WHERE f.last_snapshot <= (SELECT least(l.oldest_snapshot_id, (SELECT min(floor) FROM live))
                                 FROM lake l)
       AND NOT EXISTS (SELECT 1 FROM tag t
                        WHERE t.snapshot_id >= f.first_snapshot AND t.snapshot_id < f.last_snapshot)
       AND NOT EXISTS (SELECT 1 FROM named n
                        WHERE n.id >= f.first_snapshot AND n.id < f.last_snapshot)
$$;

-- condemn: notes files that nobody needs, with the time from which the safety window counts.
CREATE OR REPLACE FUNCTION condemn(p_limit bigint, p_dry_run boolean)
RETURNS SETOF condemned_file LANGUAGE plpgsql
SET plan_cache_mode = 'force_custom_plan' SET enable_seqscan = on AS $$
DECLARE
    v_found condemned_file[];
BEGIN
    IF NOT p_dry_run THEN
        PERFORM pg_advisory_xact_lock(7204, 0);
        -- failpoint: condemn.after_lock
        -- An expired pin protects nothing and is renewed like a new one: its row only lies about.
        DELETE FROM pin p WHERE p.expires_at <= statement_timestamp();
    END IF;
    SELECT array_agg(ROW(u.file_id, u.object_key, u.table_id, 'unreferenced', u.size_bytes,
                         'condemned', clock_timestamp(), NULL)::condemned_file)
      INTO v_found FROM (
        SELECT * FROM unneeded_files() f
         WHERE NOT EXISTS (SELECT 1 FROM condemned_file c WHERE c.file_id = f.file_id)
         ORDER BY f.last_snapshot, f.file_id LIMIT p_limit) u;
    IF NOT p_dry_run THEN
        INSERT INTO condemned_file SELECT * FROM unnest(v_found);
        -- failpoint: condemn.after_insert
    END IF;
    RETURN QUERY SELECT * FROM unnest(v_found);
END $$;

-- condemn_orphans: removes write intents that expired so long ago, and condemns what may lie under
-- their names. An intent of a data file that does not tell its table (made before that was noted)
-- names no object, and stays.
CREATE OR REPLACE FUNCTION condemn_orphans(p_older interval, p_limit bigint, p_dry_run boolean)
RETURNS SETOF condemned_file LANGUAGE plpgsql
SET plan_cache_mode = 'force_custom_plan' SET enable_seqscan = on AS $$
DECLARE
    v_old uuid[];
    v_found condemned_file[];
BEGIN
    SELECT array_agg(o.file_id) INTO v_old FROM (
        SELECT w.file_id FROM write_intent w
         WHERE w.expires_at < clock_timestamp() - p_older
           AND (w.kind IN ('payload', 'canary') OR w.kind = 'data' AND w.table_id IS NOT NULL)
         ORDER BY w.file_id LIMIT p_limit FOR UPDATE SKIP LOCKED) o;
    -- failpoint: condemn_orphans.after_intent_locks
    SELECT array_agg(ROW(w.file_id, CASE w.kind
               WHEN 'data' THEN format('tables/%s/%s.parquet', w.table_id, w.file_id)
               WHEN 'payload' THEN format('bus/%s.segment', w.file_id)
               ELSE format('canary/%s.parquet', w.file_id) END,
               w.table_id, 'orphan', NULL, 'condemned', clock_timestamp(), NULL)::condemned_file)
      INTO v_found FROM write_intent w WHERE w.file_id = ANY (v_old);
    IF NOT p_dry_run THEN
        DELETE FROM write_intent w WHERE w.file_id = ANY (v_old);
        -- failpoint: condemn_orphans.after_intents
        INSERT INTO condemned_file SELECT * FROM unnest(v_found)
        ON CONFLICT ON CONSTRAINT condemned_file_pkey DO NOTHING;
        -- failpoint: condemn_orphans.after_insert
    END IF;
    RETURN QUERY SELECT * FROM unnest(v_found);
END $$;

-- begin_deletes: the re-check, and the only step that decides. Of the files condemned for longer
-- than p_window it looks at the oldest p_limit, less those that are `deleting` already. One that is
-- needed again, by whatever it was condemned for, is pardoned: its record goes, the file stays.
-- Answers all that is `deleting`; a dry run answers what would be, and changes nothing.
CREATE OR REPLACE FUNCTION begin_deletes(p_window interval, p_limit bigint, p_dry_run boolean)
RETURNS SETOF condemned_file LANGUAGE plpgsql
SET plan_cache_mode = 'force_custom_plan' SET enable_seqscan = on AS $$
DECLARE
    v_due uuid[];
    v_unneeded uuid[];
    v_doomed uuid[];
    v_room bigint;
BEGIN
    IF NOT p_dry_run THEN
        PERFORM pg_advisory_xact_lock(7204, 0);
        -- failpoint: begin_deletes.after_lock
    END IF;
    SELECT greatest(p_limit - count(*), 0) INTO v_room
      FROM condemned_file c WHERE c.state = 'deleting';
    SELECT coalesce(array_agg(d.file_id), '{}') INTO v_due FROM (
        SELECT c.file_id FROM condemned_file c
         WHERE c.state = 'condemned' AND c.condemned_at < clock_timestamp() - p_window
         ORDER BY c.condemned_at, c.file_id LIMIT v_room) d;
    SELECT coalesce(array_agg(u.file_id), '{}') INTO v_unneeded
      FROM unneeded_files() u WHERE u.file_id = ANY (v_due);
    SELECT coalesce(array_agg(c.file_id), '{}') INTO v_doomed
      FROM condemned_file c
     WHERE c.file_id = ANY (v_due)
       AND NOT EXISTS (SELECT 1 FROM data_file f WHERE f.file_id = c.file_id
                          AND f.file_id <> ALL (v_unneeded))
       AND NOT EXISTS (SELECT 1 FROM write_intent w WHERE w.file_id = c.file_id)
       AND NOT EXISTS (SELECT 1 FROM bus_log l WHERE l.payload_key = c.object_key);
    -- failpoint: begin_deletes.after_check
    IF NOT p_dry_run THEN
        DELETE FROM condemned_file c WHERE c.file_id = ANY (v_due) AND c.file_id <> ALL (v_doomed);
        -- failpoint: begin_deletes.after_pardon
        DELETE FROM data_file f WHERE f.file_id = ANY (v_doomed);
        -- failpoint: begin_deletes.after_files
        UPDATE condemned_file c SET state = 'deleting' WHERE c.file_id = ANY (v_doomed);
        -- failpoint: begin_deletes.after_state
    END IF;
    RETURN QUERY SELECT * FROM condemned_file c
                  WHERE c.state = 'deleting' OR c.file_id = ANY (v_doomed)
                  ORDER BY c.condemned_at, c.file_id;
END $$;
