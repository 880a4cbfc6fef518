"""
What this project is made of, and what must never be in it. Nothing here is installed or served.

`python -m tests.supply_chain check` needs no network and is part of `make check`; `make sbom`, `make licences` and
`make audit` are the rest. docs/supply-chain.md says what each is for.
"""
