"""
The container image, built and run for real: `python -m tests.deploy.image`.

It is built twice and looked into, then run on this machine as the rendered manifests say, by what a kubelet would do:
volumes, init containers, probes, the preStop hook, the signal. Podman runs the containers; `make test` needs none.
"""
