-- find_keys: what is stored for idempotency keys, in whatever generation they lie (A3).
CREATE OR REPLACE FUNCTION find_keys(p_keys bytea[])
RETURNS TABLE (
    key_hash bytea, fingerprint bytea, schema_versions text, shard integer, lo bigint, place integer,
    row_count integer, reject_count integer, target text, accepted_at timestamptz,
    expires_at timestamptz, history_serial integer
) LANGUAGE sql STABLE AS $$
    SELECT i.key_hash, i.fingerprint, i.schema_versions, l.shard, l.lo, p.place,
           l.row_counts[p.place], l.reject_counts[p.place], l.targets[p.place], l.accepted_at,
           l.expires_at, l.history_serial
      FROM unnest(p_keys) AS k (key_hash)
     CROSS JOIN LATERAL (SELECT * FROM idem WHERE idem.key_hash = k.key_hash LIMIT 1) i
     CROSS JOIN LATERAL (SELECT * FROM bus_log g WHERE g.segment_id = i.segment_id LIMIT 1) l
     CROSS JOIN LATERAL (SELECT array_position(l.ordinals, i.ordinal) AS place) p
     WHERE p.place IS NOT NULL
$$;
