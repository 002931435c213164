-- init_lake: the first snapshot of the first line of history. Repeating it changes nothing, so any
-- number of processes may start on an empty database at once.
CREATE OR REPLACE FUNCTION init_lake(
    p_lake_id uuid, p_secret bytea, p_history_id uuid, p_shards integer, p_publication_id uuid
) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
    v_now timestamptz := clock_timestamp();
BEGIN
    PERFORM pg_advisory_xact_lock(7203, 0);
    IF EXISTS (SELECT 1 FROM lake) THEN
        RETURN false;
    END IF;
    INSERT INTO history (history_serial, history_id, parent_serial, fork_snapshot_id,
                         fork_positions, began_at)
    VALUES (1, p_history_id, NULL, 0, array_fill(0::bigint, ARRAY[p_shards]), v_now);
    INSERT INTO bus_state VALUES (true, p_shards, 0, v_now, 0, v_now);
    INSERT INTO bus_ring (kind, ring, began_at)
    SELECT 'segment', r, CASE WHEN r = 0 THEN v_now END FROM generate_series(0, 3) r
     UNION ALL SELECT 'key', r, CASE WHEN r = 0 THEN v_now END FROM generate_series(0, 2) r;
    INSERT INTO bus_shard SELECT s, 0, 0 FROM generate_series(0, p_shards - 1) s;
    INSERT INTO bus_claim SELECT s, 0 FROM generate_series(0, p_shards - 1) s;
    INSERT INTO bus_done SELECT s, 0 FROM generate_series(0, p_shards - 1) s;
    INSERT INTO snapshot (snapshot_id, parent_id, history_serial, published_at, operation,
                          watermark, summary, publication_id)
    VALUES (1, NULL, 1, v_now, 'genesis', array_fill(0::bigint, ARRAY[p_shards]), '{}',
            p_publication_id);
    INSERT INTO lake VALUES (true, p_lake_id, p_secret, 1, 1, v_now, v_now, 1, 1,
                             array_fill(0::bigint, ARRAY[p_shards]));
    RETURN true;
END $$;
