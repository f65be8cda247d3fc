"""The Ray cluster that a run starts for itself: on loopback alone, and closed to whoever has no token."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.integration.pbkd_process import MARK, ROOT, SECONDS

PROBE = """
import http.client, json, os, sys, urllib.error, urllib.request
from pathlib import Path

from pipelines.ray_executor import RayExecutor
from pipelines.recipe import Compute
from pipelines.store import Store

def answer(address, token):
    import grpc
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

    headers = [("authorization", f"Bearer {token}")] if token else []
    with grpc.insecure_channel(address) as channel:
        stub = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
        try:
            stub.GetAllNodeInfo(gcs_service_pb2.GetAllNodeInfoRequest(), timeout=30, metadata=headers)
        except grpc.RpcError as error:
            return error.code().name
    return "OK"

def listening():
    '''Addresses and ports, in the kernel's notation, at which the marked processes listen.'''
    sockets = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if sys.argv[2].encode() in (process / "environ").read_bytes():
                sockets |= {os.readlink(file) for file in (process / "fd").iterdir()}
        except OSError:
            continue
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state == "0A" and f"socket:[{rest[5]}]" in sockets:
                found.add(tuple(local.split(":")))
    return sorted(found)

def job_taken(port):
    '''The answer to a job given to whatever listens at `port`, by somebody who has no token.'''
    job = json.dumps({"entrypoint": f"touch {sys.argv[3]}"}).encode()
    headers = {"Content-Type": "application/json"}
    try:
        request = urllib.request.Request(f"http://127.0.0.1:{port}/api/jobs/", job, headers)
        return urllib.request.urlopen(request, timeout=10).status
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, http.client.HTTPException):
        return None  # it does not speak HTTP

def leaks(token):
    '''Where the token can be read by more than its owner: command lines of anybody, logs of Ray.'''
    from ray._private.worker import _global_node

    session = Path(_global_node.get_session_dir_path())
    places = [*Path("/proc").glob("[0-9]*/cmdline"), *session.rglob("*")]
    found = []
    for path in places:
        try:
            if path.is_file() and token.encode() in path.read_bytes():
                found.append(str(path))
        except OSError:
            continue
    return found

executor = RayExecutor(Compute(threads=1), Store(Path(sys.argv[1])))
import ray  # now that its settings are made

try:
    address = ray.get_runtime_context().gcs_address
    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"]).read_text()
    answers = [answer(address, given) for given in (None, "0" * 64, token)]
    found = listening()
    jobs = [job_taken(int(port, 16)) for _, port in found]
    places = [place for place, _ in found]
    print(json.dumps({"answers": answers, "listening": places, "jobs": jobs, "leaks": leaks(token)}))
finally:
    executor.close()
"""
LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F"}  # 127.0.0.1, also as an IPv6 address


def test_it_listens_on_loopback_and_answers_only_to_its_token(tmp_path: Path) -> None:
    store, mark = tmp_path / "runs", f"{MARK}={tmp_path}"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    found = subprocess.run(
        [sys.executable, "-c", PROBE, store, mark, tmp_path / "sprung"],
        cwd=ROOT,
        env=environment | {MARK: str(tmp_path), "HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    report = json.loads(found.stdout.splitlines()[-1])
    assert report["answers"] == ["UNAUTHENTICATED", "UNAUTHENTICATED", "OK"]
    assert not {200, 201, 202}.intersection(report["jobs"]) and not (tmp_path / "sprung").exists()
    assert report["leaks"] == []
    assert report["listening"] != []
    assert set(report["listening"]) <= LOOPBACK
    assert (store / "ray-token").stat().st_mode & 0o777 == 0o600
    assert not (tmp_path / "home" / ".ray").exists()
