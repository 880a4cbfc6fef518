-- What the service asks of its sessions, as defaults of its role: for a database that it reaches through a pooler.
--
-- Run by who administers the server (or as identity_service itself), connected to the service's own database, before
-- IDENTITY_DATABASE_POOLER=transaction is set. Running it again changes nothing:
--
--     psql -v ON_ERROR_STOP=1 -d identity -f pooler.sql
--
-- Sessions that are open keep what they had: let the pooler connect anew (PgBouncer: RECONNECT on its console). The
-- service compares when it starts, and prints the lines that are missing.

DO $$
DECLARE
    setting text[];
BEGIN
    FOREACH setting SLICE 1 IN ARRAY ARRAY[
        ['statement_timeout', '5000'],
        ['lock_timeout', '2000'],
        ['idle_in_transaction_session_timeout', '10000'],
        ['timezone', 'UTC'],
        ['enable_seqscan', 'off'],
        ['jit', 'off']
    ] LOOP
        EXECUTE format(
            'ALTER ROLE identity_service IN DATABASE %I SET %I = %L', current_database(), setting[1], setting[2]
        );
    END LOOP;
END
$$;
