"""
Prove that key rotation never hurts: `make prove-rotation`, or `python -m tests.rotation --help`.

Two replicas run as real processes on one PostgreSQL, in an accelerated time that all processes share. Keys rotate, by
schedule and by hand; replicas are killed in the middle of a step; one key is compromised. All the while tokens are
issued, and ten siblings, whose copies of the JWKS are as old as its headers allow, check them until they expire.

Three numbers must be zero: valid tokens that somebody refused, tokens signed by a key that had not been published for
long enough, and tokens of the compromised key that the service still signed, published or accepted after the promised
time. A run that did too little to mean anything fails as well.
"""
