"""
Limits how often something may happen: in Redis for all replicas together, or in memory for one process.

A bucket is one rule and one key (an account, a network). A call names several buckets: every one is checked, and only
if all of them pass is one spend taken from each. In Redis that is one script, in memory one stretch of code without an
`await`, so parallel calls can never pass together where only one of them may. A bucket named twice is spent once.

All arithmetic is done in whole microseconds, below 2**53, where Lua's numbers and Python's agree. T is the interval,
B the burst. A bucket is a pair (count, at):

*   **Plain rules** (growth 1) are GCRA. `at` is the theoretical arrival time: when the bucket will be untouched again.
    With `tat = max(at, now)`, a spend passes if `tat + T - now <= B*T`, and then `at = tat + T`. Otherwise it would
    pass in `tat + T - B*T - now`. A refund moves `at` back by T. `count` stays 0.

*   **Growing rules** keep how many spends were let through, and when the last one was. The n-th spend (n = count + 1)
    passes at once while `n <= B`, and after that when `min(T * growth**(n - B), max_interval)` has gone by since the
    last: with T = 1 and growth = 2, the first wait is 2 s, then 4, 8, … The power is a loop of multiplications,
    because those are rounded alike on every machine. A refused try counts for nothing and prolongs nothing. A refund
    takes one from the count and leaves the instant of the last spend. When `count` has reached `closed_after`, nothing
    passes any more. After `memory` without a spend the count is 0 again.

**Clocks.** The time is the caller's. Redis' own expiry only clears up what the arithmetic has already forgotten. An
instant that lies further ahead than this clock could have put it (at most `now + B*T` plain, `now` growing) comes from
a clock that has been set back since: it is cut to that, and the cut is stored even when the spend is refused. Without
storing it the wait would start afresh at every try.

**Marks** name something trusted for a while, such as a network from which an account has signed in before. A bucket
whose spend is `exempt_by` a standing mark is neither checked, spent nor refunded.

All keys of one script have to live on one node; on a Redis Cluster give the prefix a hash tag ("{identity}:limit:").
"""

from identity_service.infra.ratelimit.memory import MemoryLimiter
from identity_service.infra.ratelimit.rules import Allowed, Left, Limited, Limiter, Rule, Spend

__all__ = ["Allowed", "Left", "Limited", "Limiter", "MemoryLimiter", "Rule", "Spend"]
