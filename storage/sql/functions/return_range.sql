-- return_range: gives a leased range back, counted as a failure (nack) or not (release).
--
-- The row must still be leased under this epoch; otherwise nothing changes and false is answered
-- (B4, B7). A counted failure halves the range; a lone entry's counts towards quarantine only under
-- the canary rule of claim_range (B8).
CREATE OR REPLACE FUNCTION return_range(
    p_lease_id bigint, p_epoch bigint, p_failed boolean, p_error text, p_delay interval
) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
    v_lease bus_lease;
    v_ready timestamptz := clock_timestamp() + p_delay;
    v_counts integer := 0;
BEGIN
    SELECT * INTO v_lease FROM bus_lease b
     WHERE b.lease_id = p_lease_id AND b.epoch = p_epoch AND b.state = 'leased' FOR UPDATE;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    IF p_failed AND v_lease.hi - v_lease.lo > 1 THEN
        INSERT INTO bus_lease (lease_id, shard, lo, hi, epoch, state, not_before, attempt,
                               lone_failures, last_error)
        VALUES (nextval('lease_number'), v_lease.shard, (v_lease.lo + v_lease.hi) / 2, v_lease.hi,
                v_lease.epoch, 'ready', v_ready, v_lease.attempt + 1, 0, p_error);
        v_lease.hi := (v_lease.lo + v_lease.hi) / 2;
    ELSIF p_failed AND (v_lease.canary_epoch = v_lease.epoch OR EXISTS (
            SELECT 1 FROM published_range p
             WHERE p.owner = v_lease.owner AND p.published_at > v_lease.claimed_at)) THEN
        v_counts := 1;
    END IF;
    UPDATE bus_lease b
       SET state = 'ready', hi = v_lease.hi, not_before = v_ready, owner = NULL, expires_at = NULL,
           attempt = b.attempt + CASE WHEN p_failed THEN 1 ELSE 0 END,
           lone_failures = b.lone_failures + v_counts,
           last_error = CASE WHEN p_failed THEN p_error ELSE b.last_error END
     WHERE b.lease_id = p_lease_id;
    RETURN true;
END $$;
