-- Sequences and views that SQLAlchemy's table definitions do not describe.
-- Installed (repeatably) after each schema upgrade, before the functions.

-- Epochs and lease ids: logged sequences; a crash may skip numbers and never repeats one (B2).
CREATE SEQUENCE IF NOT EXISTS lease_epoch AS bigint;
CREATE SEQUENCE IF NOT EXISTS lease_number AS bigint;
CREATE SEQUENCE IF NOT EXISTS segment_number AS bigint;
CREATE SEQUENCE IF NOT EXISTS table_number AS integer;

-- The segments and the keys as one relation each, whatever ring they lie in.
CREATE OR REPLACE VIEW bus_segment AS
    SELECT segment_id, payload FROM bus_segment_0
    UNION ALL SELECT segment_id, payload FROM bus_segment_1
    UNION ALL SELECT segment_id, payload FROM bus_segment_2
    UNION ALL SELECT segment_id, payload FROM bus_segment_3;

CREATE OR REPLACE VIEW idem AS
    SELECT key_hash, fingerprint, segment_id, ordinal, schema_versions FROM idem_0
    UNION ALL SELECT key_hash, fingerprint, segment_id, ordinal, schema_versions FROM idem_1
    UNION ALL SELECT key_hash, fingerprint, segment_id, ordinal, schema_versions FROM idem_2;
