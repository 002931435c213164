-- give_up: ends entries whose bytes are lost for good, because an operator says so.
--
-- Why it is safe:
-- * They are set aside by `publish`, as entries under a verdict are, only without bytes: so each ends
--   once, with a snapshot, and the watermark goes on (B9, C1 to C3). Whoever asks for them gets
--   `quarantined` and the reason.
-- * Only what is leased or waits in a lease is taken, which is what has no end yet, and under a new
--   epoch each: a worker that still has one of them fails at its fence (B4, B6). Neighbours in the
--   same lease go on as a range of their own.
-- * The head row comes first, as in `publish`. Then nobody else touches a lease until this commits:
--   whoever does holds the table for one server-side batch, and never waits for the head meanwhile.
-- * What nobody has claimed yet is left alone: it was not even tried.
CREATE OR REPLACE FUNCTION give_up(
    p_owner uuid, p_shard integer, p_lo bigint, p_hi bigint, p_reason text, p_by text,
    OUT entries bigint, OUT rows bigint, OUT snapshot_id bigint
) LANGUAGE plpgsql
SET lock_timeout = '2s' AS $$
DECLARE
    v_now timestamptz;
    v_lease bus_lease;
    v_commits jsonb := '[]';
BEGIN
    PERFORM 1 FROM lake FOR UPDATE;
    LOCK TABLE bus_lease IN EXCLUSIVE MODE;
    v_now := clock_timestamp();
    entries := 0;
    rows := 0;
    FOR v_lease IN SELECT b.* FROM bus_lease b
                    WHERE b.shard = p_shard AND b.lo < p_hi AND b.hi > p_lo ORDER BY b.lo LOOP
        INSERT INTO bus_lease (lease_id, shard, lo, hi, epoch, state, not_before, attempt,
                               lone_failures, last_error)
        SELECT nextval('lease_number'), p_shard, n.lo, n.hi, nextval('lease_epoch'), 'ready', v_now,
               v_lease.attempt, 0, v_lease.last_error
          FROM (VALUES (v_lease.lo, p_lo), (p_hi, v_lease.hi)) n (lo, hi) WHERE n.lo < n.hi;
        UPDATE bus_lease b
           SET lo = greatest(b.lo, p_lo), hi = least(b.hi, p_hi), epoch = nextval('lease_epoch'),
               state = 'leased', owner = p_owner, claimed_at = v_now, expires_at = v_now
         WHERE b.lease_id = v_lease.lease_id RETURNING b.* INTO v_lease;
        SELECT v_commits || jsonb_build_object(
                   'commit_id', gen_random_uuid(), 'lease_id', v_lease.lease_id,
                   'epoch', v_lease.epoch, 'shard', p_shard, 'lo', v_lease.lo, 'hi', v_lease.hi,
                   'owner', p_owner, 'files', '[]'::jsonb,
                   'range_bytes', sum(l.entry_bytes[e.place]),
                   'quarantined', jsonb_agg(jsonb_build_object(
                       'position', e.position, 'reason', p_reason, 'attempts', v_lease.attempt,
                       'by_crash', false, 'payload', NULL))),
               give_up.entries + count(*), give_up.rows + sum(l.row_counts[e.place])
          INTO v_commits, give_up.entries, give_up.rows
          FROM bus_log l
         CROSS JOIN LATERAL (SELECT p AS position, (p - l.lo + 1)::integer AS place
                               FROM generate_series(greatest(l.lo, v_lease.lo),
                                                    least(l.hi, v_lease.hi) - 1) p) e
         WHERE l.shard = p_shard AND l.lo < v_lease.hi AND l.hi > v_lease.lo;
    END LOOP;
    IF entries = 0 THEN
        RETURN;
    END IF;
    SELECT p.snapshot_id INTO give_up.snapshot_id
      FROM publish(gen_random_uuid(), v_commits, '{}', 0, interval '0') p;
    INSERT INTO audit (at, principal, action, subject, detail)
    VALUES (clock_timestamp(), p_by, 'repair.payload_missing', format('entries %s-%s', p_shard, p_lo),
            jsonb_build_object('lo', p_lo, 'hi', p_hi, 'entries', entries, 'rows', rows,
                               'snapshot_id', give_up.snapshot_id));
END $$;
