"""`python -m server.healthcheck [PORT]`: exit code 0 if the daemon in this container is ready. Needs no curl."""

from __future__ import annotations

import sys
import urllib.request

from server.address import base_url
from server.settings import SettingsError, load_settings

TIMEOUT_SECONDS = 2.0


def main(argv: list[str]) -> int:
    """Asks `/ready` at the environment's host and port; a port as argument wins, for a daemon that got `--port`."""
    try:
        settings = load_settings({"port": argv[0]} if argv else {})
        url = f"{base_url(settings.host, settings.port)}/ready"
        # A daemon next door is never asked through the proxy of the environment.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(url, timeout=TIMEOUT_SECONDS):
            return 0
    except (OSError, SettingsError) as error:
        print(f"latentd: not ready: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
