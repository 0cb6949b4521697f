"""A data set of the hub: configuration, split and revision, from a hub that answers on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.support.commands import python
from tests.support.hub import Answers, hub

COMMITS = {"main": "a" * 40, "v1": "b" * 40}
README = """---
configs:
- config_name: en
  data_files:
  - {split: train, path: en/train.jsonl}
  - {split: validation, path: en/validation.jsonl}
- config_name: de
  data_files:
  - {split: train, path: de/train.jsonl}
---
"""


def files(revision: str) -> tuple[str, dict[str, bytes]] | None:
    """The commit and the content of ``org/data``; each record tells its revision, configuration and split."""
    name = next((name for name, commit in COMMITS.items() if revision in (name, commit)), None)
    if name is None:
        return None
    paths = ("en/train", "en/validation", "de/train")
    rows = {f"{path}.jsonl": json.dumps({"text": f"{name} {path}"}).encode() + b"\n" for path in paths}
    return COMMITS[name], {"README.md": README.encode(), **rows}


class Hub(Answers):
    """As much of the hub as ``datasets`` asks for: one data set, ``org/data``, with two revisions."""

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        match self.path.partition("?")[0].strip("/").split("/"):
            case ["api", "datasets", "org", "data"]:
                asked, revision, rest = "revision", "main", []
            case ["api", "datasets", "org", "data", asked, revision, *rest]:
                pass
            case ["datasets", "org", "data", "resolve" as asked, revision, *rest]:
                pass
            case _:
                return self.answer(b"", 404)
        if (found := files(revision)) is None:
            return self.answer(b"{}", 404, **{"X-Error-Code": "RevisionNotFound"})
        commit, held = found
        name = "/".join(rest)
        if asked == "resolve":
            code = 200 if name in held else 404
            return self.answer(held.get(name, b""), code, **{"X-Repo-Commit": commit})
        if asked == "revision":
            siblings = [{"rfilename": name} for name in held]
            return self.answer_json({"id": "org/data", "sha": commit, "siblings": siblings, "tags": []})
        paths = json.loads(body)["paths"] if asked == "paths-info" else [path for path in held if path.startswith(name)]
        sizes = {path: len(held[path]) for path in paths if path in held}
        return self.answer_json([{"type": "file", "path": p, "size": n, "oid": "c" * 40} for p, n in sizes.items()])

    do_POST = do_GET

    def answer_json(self, value: Any) -> None:
        self.answer(json.dumps(value).encode())


# The address of the hub is read when datasets is imported: hence a process of its own.
READ = """
import json, sys
from kdflow.config import SourceConfig
from kdflow.contracts import KdflowError
from kdflow.data.sources import open_records, stream_records
for options in json.loads(sys.argv[1]):
    config = SourceConfig(path="org/data", format="text", **options)
    for read in (open_records, lambda config: list(stream_records(config).read(0))):
        try:
            records = read(config)
            print(json.dumps([records[number] for number in range(len(records))]))
        except KdflowError as error:
            print(json.dumps(str(error)))
"""


def test_a_data_set_of_the_hub_is_read_at_its_configuration_split_and_revision(tmp_path: Path) -> None:
    """As a whole and as a stream."""
    asked: list[dict[str, str]] = [
        {"config": "de"}, {"config": "en", "split": "validation"}, {"config": "en", "revision": "v1"},
        {"config": "en", "revision": "v2"}, {},
    ]  # fmt: skip
    home = {"KDFLOW_CACHE": str(tmp_path / "kdflow"), "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
    with hub(Hub) as endpoint:
        done = python("-c", READ, json.dumps(asked), env={**home, "HF_ENDPOINT": endpoint})
    assert done.code == 0, done.err
    found = [json.loads(line) for line in done.out.splitlines()]
    for stored, streamed, expected in zip(
        found[::2], found[1::2], ("main de/train", "main en/validation", "v1 en/train"), strict=False
    ):
        assert stored == streamed == [["org/data[0]", {"text": expected}]]
    for refused in found[6:8]:
        assert refused.startswith("org/data (config en, split train) cannot be loaded: Revision 'v2' doesn't exist")
    for refused in found[8:]:
        assert refused.startswith("org/data (config default, split train) cannot be loaded: Config name is missing.")
        assert "'en'" in refused
        assert "'de'" in refused
