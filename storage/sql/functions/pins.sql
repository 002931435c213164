-- Pins: readers, jobs and backups claim that the files of some snapshots must not be deleted (E3).

-- hold_pin: makes or replaces a pin, whole.
--
-- Why it is safe:
-- * Advisory lock 7204 is held shared until the commit; collection takes it exclusively for its last
--   check. So a pin is committed before that check and seen by it, or comes after it and finds that
--   its snapshot is not retained any more.
-- * What is asked for must be retained in this very transaction, or be protected already by this
--   same pin, which has not expired: then the files have never been free in between. An expired pin
--   protects nothing, so its renewal is judged like a new one.
-- refused: null, or the first snapshot that is not retained; nothing was changed then.
CREATE OR REPLACE FUNCTION hold_pin(
    p_pin_id uuid, p_kind text, p_floor bigint, p_snapshot_ids bigint[], p_ttl interval,
    p_note text, OUT refused bigint, OUT expires_at timestamptz
) LANGUAGE plpgsql AS $$
DECLARE
    v_old pin;
    v_floor bigint;
BEGIN
    PERFORM pg_advisory_xact_lock_shared(7204, 0);
    -- failpoint: hold_pin.after_lock
    SELECT * INTO v_old FROM pin p
     WHERE p.pin_id = p_pin_id AND (p.expires_at IS NULL OR p.expires_at > clock_timestamp())
       FOR UPDATE;
    v_floor := v_old.floor;
    SELECT p_floor INTO hold_pin.refused FROM lake l
     WHERE p_floor < l.oldest_snapshot_id AND (v_floor IS NULL OR p_floor < v_floor);
    IF refused IS NULL THEN
        SELECT min(w.id) INTO hold_pin.refused FROM unnest(p_snapshot_ids) AS w (id)
         WHERE NOT EXISTS (SELECT 1 FROM snapshot s
                            WHERE s.snapshot_id = w.id AND s.expired_at IS NULL)
           AND NOT coalesce(w.id = ANY (v_old.snapshot_ids), false)
           AND NOT coalesce(w.id >= v_floor, false);
    END IF;
    -- failpoint: hold_pin.after_check
    IF refused IS NOT NULL THEN
        RETURN;
    END IF;
    expires_at := clock_timestamp() + p_ttl;
    INSERT INTO pin AS p (pin_id, kind, floor, snapshot_ids, expires_at, note)
    VALUES (p_pin_id, p_kind, p_floor, p_snapshot_ids, hold_pin.expires_at, p_note)
    ON CONFLICT ON CONSTRAINT pin_pkey DO UPDATE
       SET kind = excluded.kind, floor = excluded.floor, snapshot_ids = excluded.snapshot_ids,
           expires_at = excluded.expires_at, note = excluded.note;
    -- failpoint: hold_pin.after_pin
END $$;
