"""The way in to the commands: `identity-service`, or `python -m identity_service`."""

import sys


def main() -> None:
    """Run a command, or say how to get the commands where only the verifier is installed."""
    try:
        from identity_service.cli import main as run
    except ModuleNotFoundError as missing:
        if str(missing.name).startswith("identity_service"):
            raise  # a fault of ours
        sys.exit(
            f"identity-service: {missing.name} is not here; the server and its commands come with this package's"
            " extra `server`, and this is the verifier alone"
        )
    run()


if __name__ == "__main__":
    main()
