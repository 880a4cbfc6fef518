#!/bin/sh
# Runs in the new database server after roles.sql: gives each role its password.
set -eu
for role in migrator service; do
    psql -v ON_ERROR_STOP=1 -U postgres -d identity -v role="identity_$role" \
        -v password="$(cat "/run/secrets/${role}_password")" <<'SQL'
ALTER ROLE :"role" PASSWORD :'password';
SQL
done
