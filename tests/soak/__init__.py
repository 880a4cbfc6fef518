"""
Two replicas for minutes or hours, under mixed load, while one thing after the other breaks: `make soak`.

What breaks, and when, is drawn from a seed, so a run can be had again; `python -m tests.soak --help`. Everybody who
uses the service remembers what they were told (tests/faults), which is compared with the database after each fault as
far as that can be done without stopping them, and exactly at the end. Memory, file descriptors and connections must
stay flat. A run that did too little to mean anything fails as well.
"""
