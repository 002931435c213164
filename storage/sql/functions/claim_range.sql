-- claim_range: gives one owner the next range of the given shards, under a new epoch.
--
-- Why it is safe:
-- * Lease rows are taken with SKIP LOCKED, so two claimers never meet on one range (B2); the fresh
--   range is taken under the lock of the shard's claim row, which nobody else needs.
-- * Time is the database's clock at this instant, not the transaction's start, and no client's (B5).
-- * A reclaim changes the epoch of the row. Whoever holds the old epoch fails every later check on
--   (lease_id, epoch): renew, nack, release, publish (B4, B6).
-- * Expiry alone never condemns (B8): it halves the range; a lone entry's failure counts only when
--   its worker showed that it could do other work under that lease (canary, or a published range).
-- * Fresh entries are those of committed bus_log rows from next_claim on. Positions are dense, so
--   nothing can appear below next_claim later, and no foreign transaction can hide a row (B3).
-- What it costs does not depend on what is already published: groups of the log are disjoint and in
-- order, so the one that holds a position is the last to begin at it or before, one step in the
-- index.
CREATE OR REPLACE FUNCTION claim_range(
    p_owner uuid,
    p_shards integer[],
    p_ttl interval,
    p_isolation_ttl interval,
    p_backoff interval,
    p_bytes_max bigint,
    p_entries_max integer,
    p_doom_at integer,
    p_intent_ttl interval,
    OUT lease_id bigint, OUT epoch bigint, OUT shard integer, OUT lo bigint, OUT hi bigint,
    OUT attempt integer, OUT lone_failures integer, OUT ttl_s double precision, OUT doomed boolean,
    OUT last_error text, OUT table_ids integer[], OUT file_ids uuid[]
) LANGUAGE plpgsql AS $$
DECLARE
    v_now timestamptz := clock_timestamp();
    v_lease bus_lease;
    v_shard integer;
    v_next bigint;
    v_group bigint;
    v_log record;
    v_bytes bigint := 0;
    v_count integer := 0;
    v_place integer;
    v_ttl interval;
BEGIN
    SELECT * INTO v_lease FROM bus_lease b
     WHERE b.shard = ANY (p_shards)
       AND ((b.state = 'leased' AND b.expires_at <= v_now)
            OR (b.state = 'ready' AND b.not_before <= v_now))
     ORDER BY (b.state = 'ready'), b.shard, b.lo LIMIT 1 FOR UPDATE SKIP LOCKED;
    IF FOUND THEN
        IF v_lease.state = 'leased' THEN
            -- The owner let it expire: a crash, a pause, or a lost node.
            IF v_lease.hi - v_lease.lo = 1 THEN
                IF v_lease.canary_epoch = v_lease.epoch OR EXISTS (
                    SELECT 1 FROM published_range p
                     WHERE p.owner = v_lease.owner AND p.published_at > v_lease.claimed_at) THEN
                    v_lease.lone_failures := v_lease.lone_failures + 1;
                END IF;
            ELSE
                INSERT INTO bus_lease (lease_id, shard, lo, hi, epoch, state, not_before, attempt,
                                       lone_failures, last_error)
                VALUES (nextval('lease_number'), v_lease.shard, (v_lease.lo + v_lease.hi) / 2,
                        v_lease.hi, v_lease.epoch, 'ready', v_now + p_backoff, v_lease.attempt + 1,
                        0, 'the lease expired');
                v_lease.hi := (v_lease.lo + v_lease.hi) / 2;
            END IF;
            v_lease.attempt := v_lease.attempt + 1;
            v_lease.last_error := 'the lease expired';
        END IF;
        v_ttl := CASE WHEN v_lease.attempt > 0 THEN p_isolation_ttl ELSE p_ttl END;
        UPDATE bus_lease b
           SET hi = v_lease.hi, epoch = nextval('lease_epoch'), state = 'leased', owner = p_owner,
               claimed_at = v_now, expires_at = clock_timestamp() + v_ttl,
               attempt = v_lease.attempt, lone_failures = v_lease.lone_failures,
               last_error = v_lease.last_error
         WHERE b.lease_id = v_lease.lease_id RETURNING b.* INTO v_lease;
    ELSE
        FOREACH v_shard IN ARRAY p_shards LOOP
            SELECT c.next_claim INTO v_next FROM bus_claim c
              JOIN bus_shard s USING (shard)
             WHERE c.shard = v_shard AND s.next_append > c.next_claim FOR UPDATE OF c SKIP LOCKED;
            CONTINUE WHEN NOT FOUND;
            SELECT l.lo INTO v_group FROM bus_log l WHERE l.shard = v_shard AND l.lo <= v_next
             ORDER BY l.lo DESC LIMIT 1;
            v_lease.lo := v_next;
            v_lease.hi := v_next;
            <<ranges>>
            FOR v_log IN SELECT l.lo, l.hi, l.entry_bytes FROM bus_log l
                          WHERE l.shard = v_shard AND l.hi > v_next AND
                                l.lo >= coalesce(v_group, v_next)
                          ORDER BY l.lo LIMIT p_entries_max + 1 LOOP
                -- Positions are dense; a hole would mean damage, and nothing is claimed over it.
                EXIT ranges WHEN v_log.lo > v_lease.hi;
                FOR v_place IN greatest(v_next - v_log.lo, 0) + 1 .. v_log.hi - v_log.lo LOOP
                    EXIT ranges WHEN v_count > 0
                        AND (v_count >= p_entries_max
                             OR v_bytes + v_log.entry_bytes[v_place] > p_bytes_max);
                    v_bytes := v_bytes + v_log.entry_bytes[v_place];
                    v_count := v_count + 1;
                    v_lease.hi := v_log.lo + v_place;
                END LOOP;
            END LOOP;
            CONTINUE WHEN v_count = 0;
            UPDATE bus_claim c SET next_claim = v_lease.hi WHERE c.shard = v_shard;
            INSERT INTO bus_lease (lease_id, shard, lo, hi, epoch, state, owner, claimed_at,
                                   expires_at, not_before, attempt, lone_failures)
            VALUES (nextval('lease_number'), v_shard, v_lease.lo, v_lease.hi,
                    nextval('lease_epoch'), 'leased', p_owner, v_now, clock_timestamp() + p_ttl,
                    v_now, 0, 0)
            RETURNING * INTO v_lease;
            EXIT;
        END LOOP;
        IF v_lease.lease_id IS NULL THEN
            RETURN;
        END IF;
    END IF;

    lease_id := v_lease.lease_id; epoch := v_lease.epoch; shard := v_lease.shard;
    lo := v_lease.lo; hi := v_lease.hi; attempt := v_lease.attempt;
    lone_failures := v_lease.lone_failures; last_error := v_lease.last_error;
    doomed := v_lease.hi - v_lease.lo = 1 AND v_lease.lone_failures >= p_doom_at;
    ttl_s := extract(epoch FROM v_lease.expires_at - clock_timestamp());

    -- Write intents before the first byte of any file (C6): one a table in the range.
    WITH made AS (
        INSERT INTO write_intent (file_id, kind, owner, expires_at, table_id)
        SELECT gen_random_uuid(), 'data', p_owner, clock_timestamp() + p_intent_ttl, t.table_id
          FROM (SELECT DISTINCT unnest(l.table_ids) AS table_id FROM bus_log l
                 WHERE l.shard = claim_range.shard AND l.hi > claim_range.lo
                   AND l.lo < claim_range.hi AND l.lo >= coalesce((
                       SELECT f.lo FROM bus_log f
                        WHERE f.shard = claim_range.shard AND f.lo <= claim_range.lo
                        ORDER BY f.lo DESC LIMIT 1), claim_range.lo)) t
        RETURNING write_intent.file_id, write_intent.table_id)
    SELECT coalesce(array_agg(m.file_id ORDER BY m.table_id), '{}'),
           coalesce(array_agg(m.table_id ORDER BY m.table_id), '{}')
      INTO claim_range.file_ids, claim_range.table_ids FROM made m;
END $$;
