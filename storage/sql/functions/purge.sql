-- Purging. Never removes what is not terminal, never waits longer than 50 ms for a lock (B10): each
-- function carries its own lock_timeout and is called in a transaction of its own. Giving up (error
-- 55P03) is a normal answer: a lock held by a backup delays purging, never ingest.

-- switch_segments: behind the fence that no append is in, appends go on in the ring p_next, and what
-- p_ring holds is noted. The caller has seen that p_next is empty, and bounds the wait.
CREATE OR REPLACE FUNCTION switch_segments(p_ring integer, p_next integer)
RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_advisory_xact_lock(7201, 0);
    -- failpoint: switch_segments.after_fence
    UPDATE bus_state SET segment_ring = p_next, segment_ring_since = clock_timestamp()
     WHERE segment_ring = p_ring;
    -- failpoint: switch_segments.after_state
    UPDATE bus_ring r SET left_at = clock_timestamp(), terminal_at = NULL, left_positions =
        (SELECT array_agg(s.next_append ORDER BY s.shard) FROM bus_shard s)
     WHERE r.kind = 'segment' AND r.ring = p_ring;
    RETURN FOUND;
END $$;

-- rotate_segments: the next empty ring becomes the one appends write to.
CREATE OR REPLACE FUNCTION rotate_segments(p_bytes_max bigint, p_age_max interval)
RETURNS boolean LANGUAGE plpgsql
SET lock_timeout = '50ms' AS $$
DECLARE
    v_state bus_state;
    v_next integer;
    v_empty boolean;
    v_size bigint;
BEGIN
    SELECT * INTO v_state FROM bus_state;
    v_next := (v_state.segment_ring + 1) % 4;
    v_size := pg_table_size(format('bus_segment_%s', v_state.segment_ring)::regclass);
    IF v_size < p_bytes_max AND clock_timestamp() < v_state.segment_ring_since + p_age_max
       OR v_size < 65536 THEN
        RETURN false;
    END IF;
    EXECUTE format('SELECT NOT EXISTS (SELECT 1 FROM bus_segment_%s)', v_next) INTO v_empty;
    IF NOT v_empty THEN
        RETURN false;
    END IF;
    -- failpoint: rotate_segments.before_fence
    RETURN switch_segments(v_state.segment_ring, v_next);
END $$;

-- truncate_segments: empties a ring that was left and whose every entry is terminal.
CREATE OR REPLACE FUNCTION truncate_segments(p_ring integer) RETURNS boolean LANGUAGE plpgsql
SET lock_timeout = '50ms' AS $$
DECLARE
    v_filled boolean;
BEGIN
    PERFORM 1 FROM bus_ring r, bus_state s, lake h
      WHERE r.kind = 'segment' AND r.ring = p_ring AND s.segment_ring <> p_ring
        AND r.left_at IS NOT NULL
        AND NOT EXISTS (SELECT 1 FROM unnest(r.left_positions, h.watermark)
                                 AS m (needed, reached) WHERE m.reached < m.needed);
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    -- failpoint: truncate_segments.after_check
    EXECUTE format('SELECT EXISTS (SELECT 1 FROM bus_segment_%s)', p_ring) INTO v_filled;
    IF v_filled THEN
        EXECUTE format('TRUNCATE bus_segment_%s', p_ring);
    END IF;
    -- failpoint: truncate_segments.after_truncate
    UPDATE bus_ring r SET left_at = NULL, left_positions = NULL
     WHERE r.kind = 'segment' AND r.ring = p_ring;
    -- failpoint: truncate_segments.after_bookkeeping
    RETURN v_filled;
END $$;

-- rotate_keys: the next empty key generation becomes the one appends write to.
CREATE OR REPLACE FUNCTION rotate_keys(p_window interval) RETURNS boolean LANGUAGE plpgsql
SET lock_timeout = '50ms' AS $$
DECLARE
    v_state bus_state;
    v_next integer;
    v_empty boolean;
BEGIN
    SELECT * INTO v_state FROM bus_state;
    v_next := (v_state.key_ring + 1) % 3;
    IF clock_timestamp() < v_state.key_ring_since + p_window THEN
        RETURN false;
    END IF;
    EXECUTE format('SELECT NOT EXISTS (SELECT 1 FROM idem_%s)', v_next) INTO v_empty;
    IF NOT v_empty THEN
        RETURN false;
    END IF;
    -- failpoint: rotate_keys.before_fence
    PERFORM pg_advisory_xact_lock(7201, 0);
    -- failpoint: rotate_keys.after_fence
    UPDATE bus_state SET key_ring = v_next, key_ring_since = clock_timestamp()
     WHERE key_ring = v_state.key_ring;
    -- failpoint: rotate_keys.after_state
    UPDATE bus_ring r SET left_at = clock_timestamp(), terminal_at = NULL, left_positions =
        (SELECT array_agg(s.next_append ORDER BY s.shard) FROM bus_shard s)
     WHERE r.kind = 'key' AND r.ring = v_state.key_ring;
    UPDATE bus_ring r SET began_at = clock_timestamp() WHERE r.kind = 'key' AND r.ring = v_next;
    RETURN true;
END $$;

-- truncate_keys: empties a generation that was left, once every entry of it has been terminal for a
-- whole window, as first noted by terminal_at: the window counts from the later of acceptance and
-- the terminal time (A13).
CREATE OR REPLACE FUNCTION truncate_keys(p_ring integer, p_window interval)
RETURNS boolean LANGUAGE plpgsql
SET lock_timeout = '50ms' AS $$
DECLARE
    v_filled boolean;
    v_positions bigint[];
BEGIN
    UPDATE bus_ring r SET terminal_at = clock_timestamp() FROM lake h
     WHERE r.kind = 'key' AND r.ring = p_ring AND r.left_at IS NOT NULL AND r.terminal_at IS NULL
       AND NOT EXISTS (SELECT 1 FROM unnest(r.left_positions, h.watermark)
                                AS m (needed, reached) WHERE m.reached < m.needed);
    SELECT r.left_positions INTO v_positions FROM bus_ring r, bus_state s
      WHERE r.kind = 'key' AND r.ring = p_ring AND s.key_ring <> p_ring
        -- greatest() passes over nulls, so a generation that is not terminal is named here.
        AND r.left_at IS NOT NULL AND r.terminal_at IS NOT NULL
        AND clock_timestamp() > greatest(r.left_at, r.terminal_at) + p_window;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    -- failpoint: truncate_keys.after_check
    EXECUTE format('SELECT EXISTS (SELECT 1 FROM idem_%s)', p_ring) INTO v_filled;
    IF v_filled THEN
        EXECUTE format('TRUNCATE idem_%s', p_ring);
    END IF;
    -- failpoint: truncate_keys.after_truncate
    UPDATE bus_ring r SET began_at = NULL, left_at = NULL, left_positions = NULL, terminal_at = NULL
     WHERE r.kind = 'key' AND r.ring = p_ring;
    -- failpoint: truncate_keys.after_bookkeeping
    RETURN v_filled;
END $$;

-- trim_log: removes old log rows in small batches: terminal, older than a window, and accepted
-- before the oldest key generation that still holds keys began, so that no key points at them.
-- Times grow with positions within a shard, so a shard whose first row is young is left alone after
-- that row, and one that is not after as many as may go: not after all that it holds.
-- Answers how many rows went and which payload objects can be deleted. These are noted as
-- `deleting` in the same transaction: what a crash leaves is deleted by the next collection.
CREATE OR REPLACE FUNCTION trim_log(
    p_window interval, p_limit integer, OUT rows_deleted integer, OUT payload_keys text[]
) LANGUAGE sql AS $$
    WITH due AS MATERIALIZED (
        SELECT s.shard FROM bus_shard s
         WHERE (SELECT f.accepted_at FROM bus_log f WHERE f.shard = s.shard
                 ORDER BY f.lo LIMIT 1) < clock_timestamp() - p_window),
    old AS (
        SELECT l.shard, l.lo FROM lake h, due d CROSS JOIN LATERAL (
                   SELECT b.shard, b.lo, b.hi, b.accepted_at FROM bus_log b
                    WHERE b.shard = d.shard ORDER BY b.lo LIMIT p_limit) l
         WHERE l.hi <= h.watermark[l.shard + 1]
           AND l.accepted_at < clock_timestamp() - p_window
           AND l.accepted_at < (SELECT min(r.began_at) FROM bus_ring r WHERE r.kind = 'key')
         ORDER BY l.shard, l.lo LIMIT p_limit),
    gone AS (
        DELETE FROM bus_log l USING old o WHERE l.shard = o.shard AND l.lo = o.lo
        RETURNING l.payload_key),
    noted AS (
        INSERT INTO condemned_file (file_id, object_key, reason, state, condemned_at)
        SELECT substring(g.payload_key FROM '^bus/(.*)[.]segment$')::uuid, g.payload_key,
               'payload', 'deleting', clock_timestamp()
          FROM gone g WHERE g.payload_key IS NOT NULL
        ON CONFLICT ON CONSTRAINT condemned_file_pkey DO NOTHING)
    SELECT count(*)::integer,
           coalesce(array_agg(payload_key) FILTER (WHERE payload_key IS NOT NULL), '{}')
      FROM gone
$$;
