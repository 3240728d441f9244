"""Adapters on the disk of a server that runs for weeks: bounded, never taken away in use, safe between processes."""

import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from adapter_folders import with_adapters, write
from filelock import FileLock
from launching import python
from safetensors.torch import load_file, save_file

from mopl._records import DamagedFile
from mopl.conditioning.adapter_cache import AdapterCache, CacheFull
from mopl.conditioning.adapter_files import AdapterFolder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("two"), with_adapters())


def names(cache):
    return sorted(path.name for path in cache.glob("*/w=*"))


def grid(n):
    return [[i / n, 1 - i / n] for i in range(n + 1)]


def test_a_trade_off_is_made_once_and_is_that_of_its_name(folder, tmp_path):
    cache = AdapterCache(AdapterFolder(folder), tmp_path / "cache")
    path = cache.get([0.7, 0.3])
    assert path.name == "w=0.7,0.3" and path.parent.parent == tmp_path / "cache"
    made = (path / "adapter_model.safetensors").stat()
    near = torch.tensor([0.7, 0.3]) + 1e-8  # float32 0.7 is not 0.7
    assert cache.get(near) == path == AdapterCache(AdapterFolder(folder), tmp_path / "cache").get([0.7, 0.3])
    assert (path / "adapter_model.safetensors").stat() == made
    _, wanted = AdapterFolder(folder).merged([0.7, 0.3])
    found = load_file(path / "adapter_model.safetensors")
    assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_what_is_in_use_stays_and_what_is_not_goes_the_longest_unused_first(folder, tmp_path):
    first = AdapterCache(AdapterFolder(folder), tmp_path, max_cached=3)
    for weights in grid(2):
        first.get(weights)
    with pytest.raises(CacheFull, match=r"3 trade-offs are in use and .* may hold 3; ask for one of these, allow more"):
        first.get([0.9, 0.1])
    assert first.get([0.5, 0.5]).is_dir() and len(names(tmp_path)) == 3
    other = AdapterCache(AdapterFolder(folder), tmp_path, max_cached=3)  # as another process would see it
    with pytest.raises(CacheFull):
        other.get([0.9, 0.1])
    assert other.get([0.5, 0.5]).is_dir()
    first.close()
    for path, age in ((tmp_path.glob("*/w=0,1"), 1000), (tmp_path.glob("*/w=1,0"), 2000)):
        (path,) = path
        os.utime(path, ns=(path.stat().st_mtime_ns - age * 10**9,) * 2)
    other.get([0.9, 0.1])
    assert names(tmp_path) == ["w=0,1", "w=0.5,0.5", "w=0.9,0.1"]
    third = AdapterCache(AdapterFolder(folder), tmp_path, max_cached=3)
    third.get([0, 1])  # used again, by one that ends
    third.close()
    (path,) = tmp_path.glob("*/w=0,1")
    assert abs(path.stat().st_mtime - time.time()) < 500
    other.get([0.8, 0.2])
    assert names(tmp_path) == ["w=0.5,0.5", "w=0.8,0.2", "w=0.9,0.1"]
    with pytest.raises(CacheFull):
        other.get([0.6, 0.4])
    first.close()
    other.close()
    assert not list((tmp_path / ".users").iterdir())


def test_adapters_that_were_written_anew_give_new_trade_offs(folder, tmp_path):
    model = with_adapters()
    source = write(tmp_path / "adapters", model)
    cache = AdapterCache(AdapterFolder(source), tmp_path / "cache", max_cached=2)
    old = cache.get([0.7, 0.3])
    before = (old / "adapter_model.safetensors").read_bytes()
    file = source / "helpful" / "adapter_model.safetensors"
    save_file({key: 2 * tensor for key, tensor in load_file(file).items()}, str(file))
    new = cache.get([0.7, 0.3])
    assert new != old and new.name == old.name
    assert (
        (old / "adapter_model.safetensors").read_bytes() == before != (new / "adapter_model.safetensors").read_bytes()
    )
    cache.close()
    for weights in grid(1):
        cache.get(weights)
    assert not old.parent.exists()  # nothing is left of the old ones


def test_threads_that_ask_at_once_share_what_is_made(folder, tmp_path, monkeypatch):
    made = []
    adapters = AdapterFolder(folder)
    monkeypatch.setattr(adapters, "merged", lambda weights, old=adapters.merged: made.append(1) or old(weights))
    cache, found = AdapterCache(adapters, tmp_path), []
    threads = [threading.Thread(target=lambda: found.append(cache.get([0.3, 0.7]))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(set(found)) == 1 and len(found) == 8 and len(made) == 1


PROCESS = """
import os, sys
from mopl._records import DamagedFile
from mopl.conditioning.adapter_cache import AdapterCache
from mopl.conditioning.adapter_files import AdapterFolder
source, folder = sys.argv[1:]
cache = AdapterCache(AdapterFolder(source), folder, max_cached=12)
for i in range(11):
    path = cache.get([i / 10, 1 - i / 10])
    assert sorted(each.name for each in path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
print("done", flush=True)
os.kill(os.getpid(), 9)
"""


def test_two_processes_make_the_same_trade_offs_at_once_and_dead_ones_hold_nothing(folder, tmp_path):
    with ThreadPoolExecutor(2) as pool:
        ran = list(pool.map(lambda _: python("-c", PROCESS, str(folder), str(tmp_path)), range(2)))
    assert [(one.stdout.strip(), one.returncode) for one in ran] == [("done", -9)] * 2, ran
    assert len(names(tmp_path)) == 11
    for path in tmp_path.glob("*/w=*"):
        assert json.loads((path / "adapter_config.json").read_text())["r"] in (2, 3, 5)
    users = list((tmp_path / ".users").glob("*.json"))
    assert len(users) == 2 and all(len(json.loads(user.read_text())) == 11 for user in users)
    cache = AdapterCache(AdapterFolder(folder), tmp_path, max_cached=1)
    cache.get([0.25, 0.75])
    assert names(tmp_path) == ["w=0.25,0.75"] and len(list((tmp_path / ".users").iterdir())) == 2
    cache.close()


def test_what_others_did_to_a_cache_is_mended_or_named(folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError, match="is no folder; name another place for the cache"):
        AdapterCache(AdapterFolder(folder), tmp_path / "file")
    cache = AdapterCache(AdapterFolder(folder), tmp_path / "cache", max_cached=1)
    path = cache.get([0.5, 0.5])
    (path / "adapter_model.safetensors").unlink()
    assert cache.get([0.5, 0.5]) == path and (path / "adapter_model.safetensors").is_file()
    (listed,) = (tmp_path / "cache" / ".users").glob("*.json")
    listed.write_text("{bad")
    other = AdapterCache(AdapterFolder(folder), tmp_path / "cache", max_cached=1)
    with pytest.raises(DamagedFile, match=rf"{listed.name}: .*; end the servers that share this cache"):
        other.get([0.4, 0.6])
    monkeypatch.setattr("mopl.conditioning.adapter_cache._WAIT", 0.1)
    with FileLock(tmp_path / "cache" / ".lock"):
        with pytest.raises(TimeoutError, match=r"held by another process for 0\.1 seconds; end the one"):
            cache.get([0.5, 0.5])
    assert cache.get([0.5, 0.5]) == path
    cache.close()


FORK = """
import os, sys
from mopl._records import DamagedFile
from mopl.conditioning.adapter_cache import AdapterCache, CacheFull
from mopl.conditioning.adapter_files import AdapterFolder
source, folder = sys.argv[1:]
cache = AdapterCache(AdapterFolder(source), folder, max_cached=3)
paths, (there, told) = [cache.get([0.1, 0.9])], os.pipe()
cache._turn.acquire()  # as another thread may have at the fork
child = os.fork()
if child == 0:
    os.read(there, 1)
    try:
        cache.get([0.5, 0.5])
    except CacheFull:
        cache.close()
        os._exit(7)
    os._exit(1)
cache._turn.release()
paths += [cache.get([0.2, 0.8]), cache.get([0.3, 0.7])]
os.write(told, b"x")
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), all(path.is_dir() for path in paths))
other = AdapterCache(AdapterFolder(source), folder, max_cached=3)  # as another process would see it
try:
    other.get([0.5, 0.5])
except CacheFull:
    print("still in use")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_fork_takes_nothing_away_that_its_parent_was_given_since(folder, tmp_path):
    assert python("-c", FORK, str(folder), str(tmp_path)).stdout.splitlines() == ["7 True", "still in use"]


@pytest.mark.parametrize("most", [0, -1, True, 2.0, None])
def test_the_bound_is_a_positive_number(folder, tmp_path, most):
    with pytest.raises(ValueError, match=f"max_cached is {most!r} but must be an integer of at least 1"):
        AdapterCache(AdapterFolder(folder), tmp_path, max_cached=most)


def test_a_full_cache_of_another_kind_of_files_is_left_alone(folder, tmp_path):
    (tmp_path / "keep").mkdir()
    (tmp_path / "keep" / "mine.txt").write_text("mine")
    cache = AdapterCache(AdapterFolder(folder), tmp_path, max_cached=1)
    cache.get([1, 0])
    cache.close()
    cache.get([0, 1])
    cache.close()
    assert (tmp_path / "keep" / "mine.txt").read_text() == "mine" and names(tmp_path) == ["w=0,1"]
