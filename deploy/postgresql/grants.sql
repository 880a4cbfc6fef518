-- What the service may do to each table, and what it may never do to the audit trail.
--
-- Run as identity_migrator, who owns the tables, after the first migration and whenever this file has changed. Running
-- it again changes nothing, and a service that is running does not notice:
--
--     psql -v ON_ERROR_STOP=1 "postgresql://identity_migrator@db/identity" -f grants.sql
--
-- Tables that later migrations add are readable and writable from the start (the default privileges below).

BEGIN;

REVOKE ALL ON ALL TABLES IN SCHEMA public FROM identity_service;
GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO identity_service;
GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO identity_service;
ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT SELECT, INSERT, UPDATE, DELETE ON TABLES TO identity_service;
ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT USAGE ON SEQUENCES TO identity_service;

-- Which revision this is, is for the migration to say.
REVOKE INSERT, UPDATE, DELETE ON alembic_version FROM identity_service;
-- Their rows are made by the migration. (UPDATE is what locking a row takes.)
REVOKE INSERT, DELETE ON locks, leases, audit_chain FROM identity_service;
-- A bootstrap secret that was spent stays spent.
REVOKE UPDATE, DELETE ON spent_bootstrap_secrets FROM identity_service;

-- The audit trail: rows are added unsealed, sealed once, and removed when they are old. Nothing else about a row can
-- be changed, and its seal cannot be made without the master key.
REVOKE INSERT, UPDATE ON audit_events FROM identity_service;
GRANT INSERT (at, event, actor, target, client_id, network, request_id, occurrences, detail)
    ON audit_events TO identity_service;
GRANT UPDATE (seq, mac, mac_kid) ON audit_events TO identity_service;

CREATE OR REPLACE FUNCTION audit_events_stay() RETURNS trigger LANGUAGE plpgsql SET search_path = pg_catalog AS $$
BEGIN
    IF TG_OP = 'UPDATE' THEN
        IF OLD.seq IS NULL THEN
            RETURN NEW;
        END IF;
        RAISE insufficient_privilege USING MESSAGE = 'an audit row that was sealed stays as it is';
    END IF;
    -- Must be shorter than IDENTITY_AUDIT_RETENTION (400 days unless it is set), or retention fails.
    IF OLD.seq IS NOT NULL AND OLD.at < now() - interval '365 days' THEN
        RETURN OLD;
    END IF;
    RAISE insufficient_privilege USING MESSAGE = 'an audit row is not removed before its time';
END
$$;

-- Not for the owner: a migration may have to.
CREATE OR REPLACE TRIGGER audit_events_stay
    BEFORE UPDATE OR DELETE ON audit_events
    FOR EACH ROW WHEN (current_user <> 'identity_migrator')
    EXECUTE FUNCTION audit_events_stay();

COMMIT;
