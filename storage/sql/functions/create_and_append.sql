-- create_and_append: one entry together with the tables that it needs and that do not exist yet.
--
-- Why it is safe:
-- * It is a schema statement that appends: the head row is taken first, as by everybody who
--   publishes, and only then what `append_group` takes (fence, tables, keys, shard). Whoever holds
--   one of those never asks for the head, so nobody waits in a circle.
-- * Tables, snapshot, key and entry are one transaction: an observer sees none or all of them, and
--   a retry with the key finds the entry and makes nothing.
-- * The name is looked up under the head row, which every creator holds: the loser of a race is
--   answered as stale (2) and looks at the winner's table.
-- * The ids were given by the sequence before, because the payload names tables by id. They count
--   only on the line of history that gave them: a lost line may have used the same ones.
-- * An entry that `append_group` refuses takes its tables along: the inner block is rolled back.
-- * The head is held while one entry is appended and committed. This happens once for each table.
--
-- p_tables: [{table_id, name, definition}], each of version 1 with columns 1..n. The arguments after
-- p_publication_id and the answer are those of `append_group`, of one entry.
CREATE OR REPLACE FUNCTION create_and_append(
    p_history_serial integer,
    p_tables jsonb,
    p_publication_id uuid,
    p_shard integer,
    p_principals integer[],
    p_targets text[],
    p_keys bytea[],
    p_fingerprints bytea[],
    p_schema_versions text[],
    p_first_attempts timestamptz[],
    p_row_counts integer[],
    p_reject_counts integer[],
    p_entry_indexes bytea[],
    p_entry_bytes integer[],
    p_ref_entries smallint[],
    p_ref_tables integer[],
    p_ref_versions integer[],
    p_payload bytea,
    p_payload_key text,
    p_payload_intent uuid,
    p_reject_entries smallint[],
    p_reject_tables integer[],
    p_reject_rows integer[],
    p_reject_documents bytea[],
    p_window interval,
    p_backlog_bytes_hard bigint,
    OUT statuses smallint[],
    OUT stale_tables integer[],
    OUT lo bigint,
    OUT accepted_at timestamptz,
    OUT expires_at timestamptz,
    OUT history_serial integer
) LANGUAGE plpgsql AS $$
DECLARE
    v_head lake;
    v_snapshot bigint;
    v_appended record;
BEGIN
    SELECT * INTO v_head FROM lake FOR UPDATE;
    -- failpoint: create_and_append.after_head_lock
    SELECT array_agg((n ->> 'table_id')::integer) INTO stale_tables
      FROM jsonb_array_elements(p_tables) n
     WHERE v_head.history_serial <> p_history_serial
        OR EXISTS (SELECT 1 FROM lake_table t
                    WHERE t.name = n ->> 'name' AND t.state <> 'dropped');
    IF stale_tables IS NOT NULL THEN
        statuses := ARRAY[2::smallint];
        RETURN;
    END IF;

    BEGIN
        v_snapshot := next_snapshot(p_publication_id, 'create', (
            SELECT jsonb_build_object('tables', jsonb_object_agg(
                       n ->> 'table_id', jsonb_build_object('created', n ->> 'name')))
              FROM jsonb_array_elements(p_tables) n));
        -- failpoint: create_and_append.after_snapshot
        INSERT INTO lake_table (table_id, name, state, version, last_column_id, first_snapshot)
        SELECT (n ->> 'table_id')::integer, n ->> 'name', 'open', 1,
               jsonb_array_length(n -> 'definition' -> 'columns'), v_snapshot
          FROM jsonb_array_elements(p_tables) n;
        INSERT INTO table_schema (table_id, version, first_snapshot, definition)
        SELECT (n ->> 'table_id')::integer, 1, v_snapshot, n -> 'definition'
          FROM jsonb_array_elements(p_tables) n;
        -- failpoint: create_and_append.after_tables
        SELECT * INTO v_appended FROM append_group(
            p_shard, p_principals, p_targets, p_keys, p_fingerprints, p_schema_versions,
            p_first_attempts, p_row_counts, p_reject_counts, p_entry_indexes, p_entry_bytes,
            p_ref_entries, p_ref_tables, p_ref_versions, p_payload, p_payload_key,
            p_payload_intent, p_reject_entries, p_reject_tables, p_reject_rows,
            p_reject_documents, p_window, p_backlog_bytes_hard);
        IF v_appended.statuses[1] <> 0 THEN
            RAISE EXCEPTION 'the entry was refused' USING ERRCODE = 'LB002';
        END IF;
        -- failpoint: create_and_append.after_append
    EXCEPTION WHEN SQLSTATE 'LB002' THEN
        NULL;  -- the variables keep the refusal
    END;
    statuses := v_appended.statuses;
    stale_tables := v_appended.stale_tables;
    lo := v_appended.lo;
    accepted_at := v_appended.accepted_at;
    expires_at := v_appended.expires_at;
    history_serial := v_appended.history_serial;
END $$;
