-- Lines of history: what this catalog is, whether it is behind what was seen of it, and the one
-- transaction that begins a new line (contract F3, F4).
--
-- A witness is a state that somebody saw of this lake and kept outside the database: the marker in
-- the object store, or what a process remembers. A catalog that lacks what a witness saw went back
-- in time. What may be compared:
-- * the line itself, the count of publications, the ends of the shards: committed facts that only
--   grow within a line and are skipped far ahead at the beginning of the next one;
-- * the flushed end of the write-ahead log, on one timeline of one server: what was flushed is
--   never gone after a crash, so a smaller one means that the storage itself was put back. The
--   counters of sequences are not compared: they may run ahead of what is flushed.

-- server_line: which server this is, its timeline, and the flushed end of its log. All null where
-- the server does not tell (some hosted ones); raises 55000 on a standby, which cannot be written.
CREATE OR REPLACE FUNCTION server_line(
    OUT system_identifier bigint, OUT timeline integer, OUT wal bigint
) LANGUAGE plpgsql AS $$
BEGIN
    -- The timeline of the control file is that of the last checkpoint, older than a promotion.
    timeline := ('x' || left(pg_walfile_name(pg_current_wal_insert_lsn()), 8))::bit(32)::integer;
    wal := pg_current_wal_flush_lsn() - '0/0'::pg_lsn;
    SELECT c.system_identifier INTO server_line.system_identifier FROM pg_control_system() c;
EXCEPTION WHEN insufficient_privilege OR feature_not_supported OR undefined_function THEN
    system_identifier := NULL; timeline := NULL; wal := NULL;
END $$;

-- lake_state: all that a marker keeps. Null on a database without a lake.
CREATE OR REPLACE FUNCTION lake_state() RETURNS jsonb LANGUAGE sql AS $$
    SELECT jsonb_build_object(
        'lake_id', l.lake_id, 'history_id', h.history_id, 'history_serial', l.history_serial,
        'publish_count', l.publish_count, 'snapshot_id', l.snapshot_id,
        'published_at', l.published_at, 'closed_until', l.closed_until,
        'ends', (SELECT jsonb_agg(s.next_append ORDER BY s.shard) FROM bus_shard s),
        'counters', jsonb_build_object(
            'lease_epoch', (SELECT last_value FROM lease_epoch),
            'lease_number', (SELECT last_value FROM lease_number),
            'segment_number', (SELECT last_value FROM segment_number),
            'table_number', (SELECT last_value FROM table_number),
            'bus_quarantine_quarantine_id_seq',
                (SELECT last_value FROM bus_quarantine_quarantine_id_seq),
            'principal_principal_id_seq', (SELECT last_value FROM principal_principal_id_seq),
            'audit_audit_id_seq', (SELECT last_value FROM audit_audit_id_seq)),
        'system_identifier', v.system_identifier::text, 'timeline', v.timeline, 'wal', v.wal,
        'known_system', h.system_identifier::text, 'known_timeline', h.timeline,
        'seen_at', clock_timestamp())
      FROM lake l JOIN history h USING (history_serial) CROSS JOIN server_line() v
$$;

-- is_behind: whether the catalog lacks something that a witness saw.
CREATE OR REPLACE FUNCTION is_behind(p_state jsonb, p_witness jsonb) RETURNS boolean
LANGUAGE sql AS $$
    SELECT NOT EXISTS (SELECT 1 FROM history h
                        WHERE h.history_id = (p_witness ->> 'history_id')::uuid)
        OR coalesce((p_witness ->> 'publish_count')::bigint
                    > (p_state ->> 'publish_count')::bigint, false)
        OR coalesce((p_witness ->> 'snapshot_id')::bigint
                    > (p_state ->> 'snapshot_id')::bigint, false)
        OR EXISTS (SELECT 1 FROM jsonb_array_elements_text(p_witness -> 'ends')
                                 WITH ORDINALITY AS w (ended, n)
                     JOIN jsonb_array_elements_text(p_state -> 'ends')
                                 WITH ORDINALITY AS s (ended, n) USING (n)
                    WHERE w.ended::bigint > s.ended::bigint)
        OR coalesce(p_witness ->> 'system_identifier' = p_state ->> 'system_identifier'
                    AND p_witness ->> 'timeline' = p_state ->> 'timeline'
                    AND (p_witness ->> 'wal')::bigint > (p_state ->> 'wal')::bigint, false)
$$;

-- history_verdict: behind (a witness saw more), new_line (an unknown server or timeline), unbound
-- (a line that was never bound to a server), or same.
CREATE OR REPLACE FUNCTION history_verdict(p_state jsonb, p_witnesses jsonb) RETURNS text
LANGUAGE sql AS $$
    SELECT CASE
        WHEN EXISTS (SELECT 1 FROM jsonb_array_elements(p_witnesses) w
                      WHERE is_behind(p_state, w)) THEN 'behind'
        WHEN p_state ->> 'timeline' IS NULL THEN 'same'
        WHEN p_state ->> 'known_timeline' IS NULL THEN 'unbound'
        WHEN p_state ->> 'system_identifier' IS DISTINCT FROM p_state ->> 'known_system'
          OR p_state ->> 'timeline' <> p_state ->> 'known_timeline' THEN 'new_line'
        ELSE 'same' END
$$;

-- begin_history: the next line of history, forked where the catalog stands (F3).
--
-- Why it is safe:
-- * The head row is locked first, as by everybody who publishes; then the ring fence, which waits
--   for every append under way and keeps new ones out: each entry belongs to one line, and its
--   position says which. Nobody who holds the fence waits for the head, so the order cannot
--   deadlock.
-- * Every counter goes past what the catalog or any witness has, by a margin that covers what was
--   issued after the witness looked: nothing that was ever given is given again.
-- * The skipped positions are one published range without rows: terminal, so the watermark passes.
-- * All leases become ready under new epochs: whoever held one on the lost line, even with a number
--   that the kept line knows too, fails every later check.
-- * Entries not claimed yet are cut into ranges, because claims do not jump over the gap.
-- * The new line's first time is later than any time of the lost one, so that a time of the lost
--   line stays one.
CREATE OR REPLACE FUNCTION begin_history(
    p_witnesses jsonb, p_reason text, p_history_id uuid, p_publication_id uuid,
    p_bytes_max bigint, p_entries_max integer
) RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
    c_skip constant bigint := 1000000;
    c_skip_small constant bigint := 10000;
    v_head lake;
    v_now timestamptz;
    v_state jsonb;
    v_all jsonb;
    v_name text;
    v_floor bigint;
    v_serial integer;
    v_snapshot bigint;
    v_shard record;
    v_end bigint;
    v_watermark bigint[];
    v_ends bigint[] := '{}';
    v_next bigint;
BEGIN
    SELECT * INTO v_head FROM lake FOR UPDATE;
    PERFORM pg_advisory_xact_lock(7201, 0);
    PERFORM 1 FROM bus_claim c ORDER BY c.shard FOR UPDATE;
    v_state := lake_state();
    v_all := p_witnesses || jsonb_build_array(v_state);
    v_watermark := v_head.watermark;

    FOR v_name IN SELECT jsonb_object_keys(v_state -> 'counters') LOOP
        SELECT max((w -> 'counters' ->> v_name)::bigint) INTO v_floor
          FROM jsonb_array_elements(v_all) w;
        -- Two of them are integers; a table or a person is not made a million times a line.
        PERFORM setval(v_name::regclass, v_floor + CASE
            WHEN v_name IN ('table_number', 'principal_principal_id_seq') THEN c_skip_small
            ELSE c_skip END);
    END LOOP;
    SELECT max((w ->> 'history_serial')::integer) + 1, max((w ->> 'snapshot_id')::bigint) + c_skip,
           greatest(clock_timestamp(),
                    max((w ->> 'published_at')::timestamptz) + interval '1 microsecond',
                    max((w ->> 'closed_until')::timestamptz) + interval '1 microsecond')
      INTO v_serial, v_snapshot, v_now FROM jsonb_array_elements(v_all) w;

    UPDATE bus_lease b
       SET state = 'ready', epoch = nextval('lease_epoch'), owner = NULL, expires_at = NULL,
           claimed_at = NULL, canary_epoch = NULL,
           not_before = CASE WHEN b.state = 'leased' THEN v_now ELSE b.not_before END;

    FOR v_shard IN SELECT s.shard, s.next_append, c.next_claim
                     FROM bus_shard s JOIN bus_claim c USING (shard) ORDER BY s.shard LOOP
        v_ends := v_ends || v_shard.next_append;
        PERFORM cut_ranges(v_shard.shard, v_shard.next_claim, v_shard.next_append, v_now,
                           p_bytes_max, p_entries_max);
        SELECT max((w -> 'ends' ->> v_shard.shard)::bigint) + c_skip INTO v_end
          FROM jsonb_array_elements(v_all) w;
        INSERT INTO published_range (shard, lo, hi, snapshot_id, commit_id, owner, published_at)
        VALUES (v_shard.shard, v_shard.next_append, v_end, v_snapshot, p_publication_id,
                p_publication_id, v_now);
        UPDATE bus_shard s SET next_append = v_end WHERE s.shard = v_shard.shard;
        UPDATE bus_claim c SET next_claim = v_end WHERE c.shard = v_shard.shard;
        LOOP
            SELECT p.hi INTO v_next FROM published_range p
             WHERE p.shard = v_shard.shard AND p.lo = v_watermark[v_shard.shard + 1];
            EXIT WHEN NOT FOUND;
            v_watermark[v_shard.shard + 1] := v_next;
        END LOOP;
    END LOOP;

    INSERT INTO history (history_serial, history_id, parent_serial, fork_snapshot_id,
                         fork_positions, began_at, fork_time, reason, system_identifier, timeline)
    VALUES (v_serial, p_history_id, v_head.history_serial, v_head.snapshot_id, v_ends, v_now,
            greatest(v_head.published_at, v_head.closed_until), p_reason,
            (v_state ->> 'system_identifier')::bigint, (v_state ->> 'timeline')::integer);
    INSERT INTO snapshot (snapshot_id, parent_id, history_serial, published_at, operation,
                          watermark, summary, publication_id)
    VALUES (v_snapshot, v_head.snapshot_id, v_serial, v_now, 'restore', v_watermark,
            jsonb_build_object('reason', p_reason), p_publication_id);
    UPDATE lake SET history_serial = v_serial, snapshot_id = v_snapshot, published_at = v_now,
                    watermark = v_watermark, publish_count = c_skip
                        + (SELECT max((w ->> 'publish_count')::bigint)
                             FROM jsonb_array_elements(v_all) w);
    PERFORM pg_notify('lakebus_head', v_snapshot::text);
    RETURN v_snapshot;
END $$;

-- cut_ranges: makes ranges, ready to be claimed, out of entries that nobody claimed yet, within the
-- budgets of a claim (B1).
CREATE OR REPLACE FUNCTION cut_ranges(
    p_shard integer, p_lo bigint, p_hi bigint, p_now timestamptz, p_bytes_max bigint,
    p_entries_max integer
) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    v_log record;
    v_place integer;
    v_lo bigint := p_lo;
    v_hi bigint := p_lo;
    v_bytes bigint := 0;
BEGIN
    FOR v_log IN SELECT l.lo, l.hi, l.entry_bytes FROM bus_log l
                  WHERE l.shard = p_shard AND l.hi > p_lo AND l.lo >= coalesce((
                        SELECT f.lo FROM bus_log f WHERE f.shard = p_shard AND f.lo <= p_lo
                         ORDER BY f.lo DESC LIMIT 1), p_lo)
                  ORDER BY l.lo LOOP
        EXIT WHEN v_log.lo > v_hi;
        FOR v_place IN greatest(p_lo - v_log.lo, 0) + 1 .. v_log.hi - v_log.lo LOOP
            IF v_hi > v_lo AND (v_hi - v_lo >= p_entries_max
                                OR v_bytes + v_log.entry_bytes[v_place] > p_bytes_max) THEN
                PERFORM add_ready_range(p_shard, v_lo, v_hi, p_now);
                v_lo := v_hi;
                v_bytes := 0;
            END IF;
            v_bytes := v_bytes + v_log.entry_bytes[v_place];
            v_hi := v_log.lo + v_place;
        END LOOP;
    END LOOP;
    IF v_hi <> p_hi THEN
        RAISE EXCEPTION 'the bus lacks entries of shard % from position %', p_shard, v_hi
            USING ERRCODE = 'data_corrupted';
    END IF;
    IF v_hi > v_lo THEN
        PERFORM add_ready_range(p_shard, v_lo, v_hi, p_now);
    END IF;
END $$;

CREATE OR REPLACE FUNCTION add_ready_range(
    p_shard integer, p_lo bigint, p_hi bigint, p_now timestamptz
) RETURNS void LANGUAGE sql AS $$
    INSERT INTO bus_lease (lease_id, shard, lo, hi, epoch, state, not_before, attempt,
                           lone_failures)
    VALUES (nextval('lease_number'), p_shard, p_lo, p_hi, nextval('lease_epoch'), 'ready', p_now,
            0, 0)
$$;

-- settle_history: judges the catalog by the witnesses and does what follows, in one transaction, so
-- that any number of processes may ask at once and one line begins.
--
-- Answers empty (no lake), same, behind (nothing was changed), or began. The loss of one line is
-- accepted by naming it (p_accept): when another has begun meanwhile, the answer is changed.
CREATE OR REPLACE FUNCTION settle_history(
    p_witnesses jsonb, p_accept uuid, p_reason text, p_history_id uuid, p_publication_id uuid,
    p_bytes_max bigint, p_entries_max integer, OUT verdict text, OUT state jsonb
) LANGUAGE plpgsql AS $$
BEGIN
    state := lake_state();
    IF state IS NULL THEN
        verdict := 'empty';
        RETURN;
    END IF;
    verdict := history_verdict(state, p_witnesses);
    IF p_accept IS NULL AND verdict IN ('same', 'behind') THEN
        RETURN;
    END IF;
    PERFORM 1 FROM lake FOR UPDATE;
    state := lake_state();
    verdict := history_verdict(state, p_witnesses);
    IF p_accept IS NOT NULL AND p_accept <> (state ->> 'history_id')::uuid THEN
        verdict := 'changed';
    ELSIF p_accept IS NOT NULL OR verdict = 'new_line' THEN
        PERFORM begin_history(p_witnesses, coalesce(p_reason, 'timeline'), p_history_id,
                              p_publication_id, p_bytes_max, p_entries_max);
        verdict := 'began';
        state := lake_state();
    ELSIF verdict = 'unbound' THEN
        UPDATE history h SET system_identifier = (state ->> 'system_identifier')::bigint,
                             timeline = (state ->> 'timeline')::integer
         WHERE h.history_serial = (state ->> 'history_serial')::integer;
        verdict := 'same';
    END IF;
END $$;
