-- Jobs of maintenance: what is asked for, who runs it, how it ended.
--
-- Why it is safe:
-- * Submissions take one advisory lock, so a key is one job for ever, equal open jobs are one, and
--   two schedulers submit a periodic job once.
-- * A job is taken with SKIP LOCKED, under an epoch from the sequence of all leases, which a restore
--   skips too. Whoever holds an older epoch fails every later write of the record.
-- * Time is the database's clock at this instant.
CREATE OR REPLACE FUNCTION submit_job(
    p_job_id uuid, p_kind text, p_table_id integer, p_parameters jsonb, p_dry_run boolean,
    p_requested_by text, p_principal_id integer, p_key text, p_fingerprint bytea,
    OUT was_there boolean, OUT conflict boolean, OUT found_id uuid
) LANGUAGE plpgsql AS $$
DECLARE
    v_job job;
BEGIN
    PERFORM pg_advisory_xact_lock(7205, 0);
    IF p_key IS NOT NULL THEN
        SELECT * INTO v_job FROM job j
         WHERE j.principal_id = p_principal_id AND j.kind = p_kind AND j.idempotency_key = p_key;
    ELSE
        SELECT * INTO v_job FROM job j
         WHERE j.state IN ('queued', 'running') AND j.kind = p_kind
           AND j.table_id IS NOT DISTINCT FROM p_table_id
           AND j.parameters = p_parameters AND j.dry_run = p_dry_run
         ORDER BY j.created_at LIMIT 1;
    END IF;
    was_there := FOUND;
    conflict := was_there AND p_key IS NOT NULL
                AND v_job.fingerprint IS DISTINCT FROM p_fingerprint;
    found_id := coalesce(v_job.job_id, p_job_id);
    IF NOT was_there THEN
        INSERT INTO job (job_id, kind, table_id, parameters, dry_run, requested_by, principal_id,
                         idempotency_key, fingerprint, state, attempt, epoch, not_before,
                         created_at, report)
        VALUES (p_job_id, p_kind, p_table_id, p_parameters, p_dry_run, p_requested_by,
                p_principal_id, p_key, p_fingerprint, 'queued', 0, 0, clock_timestamp(),
                clock_timestamp(), '{}');
    END IF;
END $$;

-- submit_due_job: the periodic job, when its time has come; the first time is now. Answers its id,
-- or that of an equal one still open; null when it is not yet time.
CREATE OR REPLACE FUNCTION submit_due_job(
    p_job_id uuid, p_kind text, p_every interval, p_jitter double precision, p_requested_by text
) RETURNS uuid LANGUAGE plpgsql AS $$
DECLARE
    v_now timestamptz;
    v_next timestamptz;
BEGIN
    PERFORM pg_advisory_xact_lock(7205, 0);
    v_now := clock_timestamp();
    SELECT s.next_at INTO v_next FROM job_schedule s WHERE s.kind = p_kind;
    -- A period that was shortened does not wait for the end of a longer one.
    IF v_next > v_now AND v_next <= v_now + p_every * 1.1 THEN
        RETURN NULL;
    END IF;
    INSERT INTO job_schedule AS s (kind, next_at)
    VALUES (p_kind, v_now + p_every * (1 + p_jitter / 10))
    ON CONFLICT (kind) DO UPDATE SET next_at = excluded.next_at;
    RETURN (SELECT s.found_id FROM submit_job(p_job_id, p_kind, NULL, '{}', false, p_requested_by,
                                              NULL, NULL, NULL) s);
END $$;

-- claim_job: the oldest job that is queued and whose time has come, or whose worker let its lease
-- expire.
CREATE OR REPLACE FUNCTION claim_job(
    p_owner uuid, p_kinds text[], p_ttl interval
) RETURNS SETOF job LANGUAGE plpgsql AS $$
DECLARE
    v_now timestamptz := clock_timestamp();
    v_id uuid;
BEGIN
    SELECT j.job_id INTO v_id FROM job j
     WHERE j.kind = ANY (p_kinds) AND j.state IN ('queued', 'running')
       AND ((j.state = 'queued' AND j.not_before <= v_now)
            OR (j.state = 'running' AND j.expires_at <= v_now))
     ORDER BY j.created_at, j.job_id LIMIT 1 FOR UPDATE SKIP LOCKED;
    IF NOT FOUND THEN
        RETURN;
    END IF;
    RETURN QUERY UPDATE job j
       SET state = 'running', epoch = nextval('lease_epoch'), owner = p_owner,
           expires_at = clock_timestamp() + p_ttl, attempt = j.attempt + 1,
           started_at = coalesce(j.started_at, clock_timestamp())
     WHERE j.job_id = v_id RETURNING j.*;
END $$;

-- finish_job: ends the job. Repeating it under the same epoch is well; false: the lease is lost.
CREATE OR REPLACE FUNCTION finish_job(
    p_job_id uuid, p_epoch bigint, p_report jsonb, p_error jsonb
) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
    v_job job;
BEGIN
    SELECT * INTO v_job FROM job j WHERE j.job_id = p_job_id AND j.epoch = p_epoch FOR UPDATE;
    IF NOT FOUND OR v_job.state = 'queued' THEN
        RETURN false;
    END IF;
    IF v_job.state = 'running' THEN
        UPDATE job j
           SET state = CASE WHEN p_error IS NULL THEN 'done' ELSE 'failed' END, report = p_report,
               error = p_error, owner = NULL, expires_at = NULL, ended_at = clock_timestamp()
         WHERE j.job_id = p_job_id;
    END IF;
    RETURN true;
END $$;
