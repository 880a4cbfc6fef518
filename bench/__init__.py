"""
Measure the whole service on this machine: `python -m bench`, or `make bench`.

Speed is told as a ratio to the machine's own RSA-2048 signatures per second, because a number of requests per second
says more about the machine than about the service.
"""
