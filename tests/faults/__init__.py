"""
What breaks, and what must be true all the same: two replicas in processes of their own, with a network in our hand.

A stage has everything: PostgreSQL and Redis that can be stopped, a proxy between each replica and each of them, and
people who use the service all the time and remember every word they were told. A trouble is what is done to the
stage meanwhile. Afterwards one function compares what people were told with what the database holds.
"""
