-- What the functions of a test database call where the product's have a marker. Never part of a
-- lake: tests/failpoints/sql.py installs it, into databases that are dropped after their test.
CREATE TABLE IF NOT EXISTS failpoint (
    failpoint_id integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name text NOT NULL,
    action text NOT NULL,
    argument text NOT NULL,
    within_s double precision NOT NULL,
    skip bigint NOT NULL,
    times bigint,             -- NULL: always
    released bigint,          -- pauses up to this shot are over; NULL: all
    active boolean NOT NULL
);
CREATE UNIQUE INDEX IF NOT EXISTS failpoint_active ON failpoint (name) WHERE active;

CREATE OR REPLACE FUNCTION arm_failpoint(
    p_name text, p_action text, p_argument text, p_within_s double precision, p_skip bigint,
    p_times bigint
) RETURNS integer LANGUAGE plpgsql SET search_path = lakebus AS $$
DECLARE
    v_id integer;
BEGIN
    UPDATE failpoint SET active = false, released = NULL WHERE name = p_name AND active;
    INSERT INTO failpoint (name, action, argument, within_s, skip, times, released, active)
    VALUES (p_name, p_action, p_argument, p_within_s, p_skip, p_times, 0, true)
    RETURNING failpoint_id INTO v_id;
    EXECUTE format('CREATE SEQUENCE failpoint_hits_%s MINVALUE 0 START 1', v_id);
    RETURN v_id;
END $$;

-- How often an armed failpoint acted.
CREATE OR REPLACE FUNCTION failpoint_shots(p_id integer) RETURNS bigint LANGUAGE plpgsql
SET search_path = lakebus AS $$
DECLARE
    v_point failpoint;
    v_hits bigint;
BEGIN
    SELECT * INTO STRICT v_point FROM failpoint WHERE failpoint_id = p_id;
    EXECUTE format('SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM failpoint_hits_%s',
                   p_id) INTO v_hits;
    RETURN least(greatest(v_hits - v_point.skip, 0), coalesce(v_point.times, v_hits));
END $$;

-- Answers false: it is called as the condition of an empty IF (see sql_with_calls). Each query in it
-- has its own snapshot (READ COMMITTED), so it sees what a test commits meanwhile.
CREATE OR REPLACE FUNCTION reach_failpoint(p_name text) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
    v_point lakebus.failpoint;
    v_shot bigint;
    v_needed bigint;
    v_deadline timestamptz;
BEGIN
    SELECT * INTO v_point FROM lakebus.failpoint f WHERE f.name = p_name AND f.active;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    v_shot := nextval(format('lakebus.failpoint_hits_%s', v_point.failpoint_id)) - v_point.skip;
    IF v_shot < 1 OR v_shot > coalesce(v_point.times, v_shot) THEN
        RETURN false;
    END IF;
    v_deadline := clock_timestamp() + make_interval(secs => v_point.within_s);
    CASE v_point.action
    WHEN 'error' THEN
        RAISE EXCEPTION 'failpoint %', p_name USING ERRCODE = v_point.argument;
    WHEN 'delay' THEN
        PERFORM pg_sleep(v_point.argument::double precision);
    WHEN 'terminate' THEN
        PERFORM pg_terminate_backend(pg_backend_pid());
        PERFORM pg_sleep(60); -- never whole: the signal ends it
    WHEN 'pause' THEN
        WHILE EXISTS (SELECT 1 FROM lakebus.failpoint f
                       WHERE f.failpoint_id = v_point.failpoint_id AND f.released < v_shot) LOOP
            IF clock_timestamp() > v_deadline THEN
                RAISE EXCEPTION 'nobody resumed failpoint %', p_name;
            END IF;
            PERFORM pg_sleep(0.002);
        END LOOP;
    WHEN 'barrier' THEN
        v_needed := (v_shot + v_point.argument::bigint - 1) / v_point.argument::bigint
                    * v_point.argument::bigint;
        WHILE lakebus.failpoint_shots(v_point.failpoint_id) < v_needed
              AND EXISTS (SELECT 1 FROM lakebus.failpoint f
                           WHERE f.failpoint_id = v_point.failpoint_id AND f.active) LOOP
            IF clock_timestamp() > v_deadline THEN
                RAISE EXCEPTION 'the others did not come to failpoint %', p_name;
            END IF;
            PERFORM pg_sleep(0.001);
        END LOOP;
    END CASE;
    RETURN false;
END $$;
