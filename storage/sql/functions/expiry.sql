-- Expiry and tags: which snapshots can be read (E8).
--
-- Why it is safe:
-- * Advisory lock 7204 orders what ends a snapshot's life (expiry, the last tag's end, collection:
--   exclusive) against what prolongs it (tags and pins: shared). Each of the latter looks whether
--   the snapshot is retained after it has the lock, so it came before the end or is refused.
-- * It is taken before the head row, and whoever holds the head row never asks for it: no deadlock.
--   The head row is written last, so that publications wait for the commit only.
-- * Snapshots end in order of id and never the head: what is retained without a tag is always one
--   piece, from `lake.oldest_snapshot_id` on. Ids have holes after a restore (F3): rows are counted,
--   ids are never subtracted.

-- expire_snapshots: expires the oldest snapshots that are older than p_keep AND beyond the newest
-- p_keep_count, at most p_limit. A tagged one stays readable. A dry run changes nothing.
CREATE OR REPLACE FUNCTION expire_snapshots(
    p_keep interval, p_keep_count bigint, p_limit bigint, p_dry_run boolean,
    OUT first_id bigint, OUT last_id bigint, OUT tagged bigint, OUT oldest_snapshot_id bigint
) LANGUAGE plpgsql AS $$
DECLARE
    v_before timestamptz := clock_timestamp() - p_keep;
    v_oldest bigint;
    v_counted bigint;
BEGIN
    IF NOT p_dry_run THEN
        PERFORM pg_advisory_xact_lock(7204, 0);
        -- failpoint: expire_snapshots.after_lock
    END IF;
    SELECT l.oldest_snapshot_id INTO v_oldest FROM lake l;
    oldest_snapshot_id := v_oldest;
    tagged := 0;
    -- The oldest of those that their number alone keeps; none when there are not so many.
    SELECT s.snapshot_id INTO v_counted FROM snapshot s
     ORDER BY s.snapshot_id DESC OFFSET greatest(p_keep_count, 1) - 1 LIMIT 1;
    IF NOT FOUND OR p_limit < 1 THEN
        RETURN;
    END IF;
    SELECT coalesce(min(w.snapshot_id) FILTER (WHERE w.snapshot_id >= v_counted
                                                  OR w.published_at >= v_before),
                    max(w.snapshot_id))
      INTO expire_snapshots.oldest_snapshot_id
      FROM (SELECT s.snapshot_id, s.published_at FROM snapshot s WHERE s.snapshot_id >= v_oldest
             ORDER BY s.snapshot_id LIMIT p_limit + 1) w;
    SELECT min(s.snapshot_id), max(s.snapshot_id),
           count(*) FILTER (WHERE EXISTS (SELECT 1 FROM tag t WHERE t.snapshot_id = s.snapshot_id))
      INTO expire_snapshots.first_id, expire_snapshots.last_id, expire_snapshots.tagged
      FROM snapshot s
     WHERE s.snapshot_id >= v_oldest
       AND s.snapshot_id < expire_snapshots.oldest_snapshot_id;
    IF p_dry_run OR first_id IS NULL THEN
        RETURN;
    END IF;
    UPDATE snapshot s SET expired_at = clock_timestamp()
     WHERE s.snapshot_id BETWEEN first_id AND last_id AND s.expired_at IS NULL
       AND NOT EXISTS (SELECT 1 FROM tag t WHERE t.snapshot_id = s.snapshot_id);
    -- failpoint: expire_snapshots.after_snapshots
    UPDATE lake SET oldest_snapshot_id = expire_snapshots.oldest_snapshot_id;
    -- failpoint: expire_snapshots.after_head
END $$;

-- create_tag: a name that keeps a snapshot for ever, if it is retained now.
-- outcome: tagged (now or before), taken (the name is another snapshot's), not_retained.
CREATE OR REPLACE FUNCTION create_tag(
    p_name text, p_snapshot_id bigint, p_created_by text,
    OUT outcome text, OUT name text, OUT snapshot_id bigint, OUT created_at timestamptz,
    OUT created_by text
) LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_advisory_xact_lock_shared(7204, 0);
    -- failpoint: create_tag.after_lock
    INSERT INTO tag (name, snapshot_id, created_at, created_by)
    SELECT p_name, s.snapshot_id, clock_timestamp(), p_created_by FROM snapshot s
     WHERE s.snapshot_id = p_snapshot_id AND s.expired_at IS NULL
    ON CONFLICT ON CONSTRAINT tag_pkey DO NOTHING;
    -- failpoint: create_tag.after_insert
    SELECT CASE WHEN t.snapshot_id = p_snapshot_id THEN 'tagged' ELSE 'taken' END,
           t.name, t.snapshot_id, t.created_at, t.created_by
      INTO create_tag.outcome, create_tag.name, create_tag.snapshot_id, create_tag.created_at,
           create_tag.created_by
      FROM tag t WHERE t.name = p_name;
    IF NOT FOUND THEN
        outcome := 'not_retained';
    END IF;
END $$;

-- drop_tag: removes a tag. A snapshot that nothing else keeps expires with it, so the lock is
-- exclusive: no other tag or pin can find that snapshot retained at the same time.
CREATE OR REPLACE FUNCTION drop_tag(p_name text) RETURNS SETOF tag LANGUAGE plpgsql AS $$
DECLARE
    v_tag tag;
BEGIN
    PERFORM pg_advisory_xact_lock(7204, 0);
    -- failpoint: drop_tag.after_lock
    DELETE FROM tag t WHERE t.name = p_name RETURNING t.* INTO v_tag;
    IF NOT FOUND THEN
        RETURN;
    END IF;
    UPDATE snapshot s SET expired_at = clock_timestamp()
     WHERE s.snapshot_id = v_tag.snapshot_id AND s.expired_at IS NULL
       AND s.snapshot_id < (SELECT l.oldest_snapshot_id FROM lake l)
       AND NOT EXISTS (SELECT 1 FROM tag t WHERE t.snapshot_id = s.snapshot_id);
    -- failpoint: drop_tag.after_expiry
    RETURN NEXT v_tag;
END $$;
