"""The JSON API for people: registering, what is theirs, where they are signed in, and getting back in."""
