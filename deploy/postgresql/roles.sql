-- The two roles of the service, and what they may do to the database as a whole.
--
-- Run by who administers the server (a role with CREATEROLE that owns the database; no superuser is needed), connected
-- to the service's own database, once, before the first migration. Running it again changes nothing:
--
--     psql -v ON_ERROR_STOP=1 -d identity -f roles.sql
--
-- Then give each role a password (`\password identity_migrator`, `\password identity_service`), migrate, and run
-- grants.sql as identity_migrator.

BEGIN;

DO $$
BEGIN
    -- Owns every table and changes their form. Only the migration has its password.
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'identity_migrator') THEN
        CREATE ROLE identity_migrator LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION NOBYPASSRLS NOINHERIT;
    END IF;
    -- What the replicas and the operator's commands run as: rows, and nothing else.
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'identity_service') THEN
        CREATE ROLE identity_service LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION NOBYPASSRLS NOINHERIT;
    END IF;
    -- Nobody else comes in, and nobody makes temporary tables.
    EXECUTE format('REVOKE ALL ON DATABASE %I FROM PUBLIC', current_database());
    EXECUTE format('GRANT CONNECT ON DATABASE %I TO identity_migrator, identity_service', current_database());
END
$$;

REVOKE ALL ON SCHEMA public FROM PUBLIC;
GRANT USAGE, CREATE ON SCHEMA public TO identity_migrator;
GRANT USAGE ON SCHEMA public TO identity_service;

-- A swarm of replicas must not use up the server: see "Sizes that hang together" in deploy/README.md.
ALTER ROLE identity_migrator CONNECTION LIMIT 10;
ALTER ROLE identity_service CONNECTION LIMIT 150;

-- The service asks for shorter times by itself; these hold for whoever gets hold of its password, too.
ALTER ROLE identity_service SET statement_timeout = '10s';
ALTER ROLE identity_service SET lock_timeout = '5s';
ALTER ROLE identity_service SET idle_in_transaction_session_timeout = '15s';
ALTER ROLE identity_migrator SET lock_timeout = '5s';
ALTER ROLE identity_migrator SET idle_in_transaction_session_timeout = '60s';

COMMIT;
