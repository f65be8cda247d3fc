"""A real S3 server on loopback for tests: moto's, which knows If-None-Match and If-Match in puts.

python -m tests.integration.s3_server      # prints its address, serves until it is killed
"""

import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
BUCKET = "bucket"
# Buckets where one condition of puts is ignored, as by servers that are behind the times.
CARELESS = {"careless-create": "HTTP_IF_NONE_MATCH", "careless-append": "HTTP_IF_MATCH"}


class OneByOne:
    """Moto looks whether an object is there and then writes it: only one at a time does that atomically."""

    def __init__(self, app: Any) -> None:
        self._app, self._lock = app, threading.Lock()

    def __call__(self, environ: Any, start_response: Any) -> Iterable[bytes]:
        if (ignored := CARELESS.get(environ["PATH_INFO"].split("/")[1])) is not None:
            environ.pop(ignored, None)
        with self._lock:
            return list(self._app(environ, start_response))


def client(url: str) -> Any:
    """A client of the server at `url` that is not the one pbkd uses."""
    import boto3

    keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test-secret"}
    return boto3.client("s3", endpoint_url=url, region_name="us-east-1", **keys)


def main() -> None:
    """Serve."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Silent(WSGIRequestHandler):
        def log_request(self, *arguments: object) -> None:
            """Nobody reads it."""

    app = OneByOne(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=Silent)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    for bucket in (BUCKET, *CARELESS):
        client(url).create_bucket(Bucket=bucket)
    sys.stdout.write(f"{url}\n")
    sys.stdout.flush()
    threading.Event().wait()


@contextmanager
def s3_server(cache: Path) -> Iterator[dict[str, str]]:
    """The environment that leads to a server with an empty bucket; copies on this machine go to `cache`."""
    command = [sys.executable, "-m", "tests.integration.s3_server"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield {
            "AWS_ENDPOINT_URL": process.stdout.readline().strip(),
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test-secret",
            "AWS_REGION": "us-east-1",
            "XDG_CACHE_HOME": str(cache),
        }
    finally:
        process.kill()
        process.communicate()


if __name__ == "__main__":
    main()
