-- publish_swap: one publication of maintenance: files take the place of others in one table.
--
-- Why it is safe:
-- * The head row comes first, as in `publish`, so a swap is one more snapshot on the one line (C4),
--   and no other publication can end one of the inputs meanwhile.
-- * The requirement is checked here and not before: every input is live in this very transaction.
--   Files never change and deletes are copies, so a live input is one that no delete, no drop and
--   no other swap has touched (E2). An append touches no input: it never makes a swap lose (C7).
-- * The counts are compared here, with those that the catalog holds of the inputs (E1).
-- * The outputs' write intents are consumed here, locked in order of file id; collection removes an
--   intent before it deletes a file. Whichever commits first wins (C6).
-- * The watermark stays as it is: nothing was accepted, nothing became terminal.
-- * A publication that already happened is answered from its record (C5).
-- outcome: published (now or before), inputs_lost, intent_lost, rows_differ; only the first changes
-- anything.
CREATE OR REPLACE FUNCTION publish_swap(
    p_publication_id uuid,
    p_table_id integer,
    p_operation text,
    p_inputs uuid[],
    p_files jsonb,
    p_rows_removed bigint,
    p_summary jsonb,
    OUT outcome text, OUT snapshot_id bigint, OUT published_at timestamptz
) LANGUAGE plpgsql AS $$
DECLARE
    v_files uuid[];
    v_count bigint;
    v_rows_in numeric;
    v_bytes_in numeric;
    v_rows_out numeric;
    v_bytes_out numeric;
BEGIN
    PERFORM 1 FROM lake FOR UPDATE;
    -- failpoint: publish_swap.after_head_lock
    SELECT 'published', s.snapshot_id, s.published_at
      INTO publish_swap.outcome, publish_swap.snapshot_id, publish_swap.published_at
      FROM snapshot s WHERE s.publication_id = p_publication_id;
    IF FOUND THEN
        RETURN;
    END IF;

    -- A file named twice counts once here, so it is lost as well.
    SELECT count(*), coalesce(sum(f.rows), 0), coalesce(sum(f.size_bytes), 0)
      INTO v_count, v_rows_in, v_bytes_in
      FROM data_file f
     WHERE f.file_id = ANY (p_inputs) AND f.table_id = p_table_id AND f.last_snapshot IS NULL;
    IF v_count <> cardinality(p_inputs) THEN
        outcome := 'inputs_lost';
        RETURN;
    END IF;

    SELECT coalesce(array_agg((f ->> 'file_id')::uuid), '{}'),
           coalesce(sum((f ->> 'rows')::bigint), 0), coalesce(sum((f ->> 'size_bytes')::bigint), 0)
      INTO v_files, v_rows_out, v_bytes_out FROM jsonb_array_elements(p_files) f;
    IF v_rows_out <> v_rows_in - p_rows_removed THEN
        outcome := 'rows_differ';
        RETURN;
    END IF;

    SELECT count(*) INTO v_count FROM (
        SELECT 1 FROM write_intent w WHERE w.file_id = ANY (v_files) AND w.kind = 'data'
         ORDER BY w.file_id FOR UPDATE) locked;
    -- failpoint: publish_swap.after_intent_locks
    IF v_count <> cardinality(v_files) THEN
        outcome := 'intent_lost';
        RETURN;
    END IF;
    DELETE FROM write_intent w WHERE w.file_id = ANY (v_files);
    -- failpoint: publish_swap.after_intents_consumed

    outcome := 'published';
    snapshot_id := next_snapshot(p_publication_id, p_operation, jsonb_build_object('tables',
        jsonb_build_object(p_table_id::text, p_summary || jsonb_build_object(
            'files_added', cardinality(v_files), 'rows_added', v_rows_out,
            'bytes_added', v_bytes_out, 'files_removed', cardinality(p_inputs),
            'rows_removed', v_rows_in, 'bytes_removed', v_bytes_in))));
    SELECT l.published_at INTO publish_swap.published_at FROM lake l;
    -- failpoint: publish_swap.after_snapshot
    UPDATE data_file f SET last_snapshot = publish_swap.snapshot_id
     WHERE f.file_id = ANY (p_inputs);
    -- failpoint: publish_swap.after_inputs
    INSERT INTO data_file (file_id, table_id, schema_version, first_snapshot, object_key, rows,
                           size_bytes, sha256, statistics, partition, layout)
    SELECT (f ->> 'file_id')::uuid, p_table_id, (f ->> 'schema_version')::integer,
           publish_swap.snapshot_id, f ->> 'object_key', (f ->> 'rows')::bigint,
           (f ->> 'size_bytes')::bigint, f ->> 'sha256', f ->> 'statistics', f ->> 'partition',
           coalesce(f ->> 'layout', '')
      FROM jsonb_array_elements(p_files) f;
    -- failpoint: publish_swap.after_files
END $$;
