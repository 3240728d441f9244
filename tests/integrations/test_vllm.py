"""The LoRA resolver, with stand-ins for what it uses of vLLM, whose own code never runs here.

`Server` does what `OpenAIServingModels.resolve_lora` of vLLM's source does with a resolver: one at a time for a name,
a number of its own, and the name kept once the engine has loaded the adapter; an exception goes to whoever asked.
"""

import asyncio
import importlib
import json
import sys
import threading
import types
from abc import ABC, abstractmethod
from collections import defaultdict
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from adapter_folders import BASE, with_adapters, write
from safetensors.torch import load_file

from mopl.conditioning.adapter_files import AdapterFolder

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

VARIABLES = ("ADAPTERS", "BASE_MODEL", "MAX_ADAPTERS", "DECIMALS", "CACHE")


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str = ""

    def __post_init__(self):
        assert self.lora_int_id > 0 and self.lora_path


class LoRAResolver(ABC):
    @abstractmethod
    async def resolve_lora(self, base_model_name, lora_name): ...


class Registry:
    def __init__(self):
        self.resolvers = {}

    def register_resolver(self, resolver_name, resolver):
        self.resolvers[resolver_name] = resolver


class Server:
    def __init__(self, registry, model=BASE):
        self.model, self.resolvers = model, list(registry.resolvers.values())
        self.requests, self.locks, self.count, self.asked = {}, defaultdict(asyncio.Lock), 0, []

    async def resolve_lora(self, name):
        async with self.locks[name]:
            if name not in self.requests:
                self.count += 1
                for resolver in self.resolvers:
                    self.asked.append(name)
                    if (request := await resolver.resolve_lora(self.model, name)) is not None:
                        request.lora_int_id = self.count
                        self.requests[name] = request
            return self.requests.get(name)


@pytest.fixture
def plugin(monkeypatch):
    """Return the module, imported where vLLM's stand-ins are; afterwards it is forgotten."""
    registry = Registry()
    parts = {
        "vllm": {},
        "vllm.envs": {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": True},
        "vllm.lora": {},
        "vllm.lora.request": {"LoRARequest": LoRARequest},
        "vllm.lora.resolver": {"LoRAResolver": LoRAResolver, "LoRAResolverRegistry": registry},
    }
    for name, attributes in parts.items():
        module = types.ModuleType(name)
        module.__dict__.update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["vllm"].envs = sys.modules["vllm.envs"]
    for variable in VARIABLES:
        monkeypatch.delenv(f"MOPL_VLLM_{variable}", raising=False)
    monkeypatch.delitem(sys.modules, "mopl.integrations.vllm", raising=False)
    yield importlib.import_module("mopl.integrations.vllm")
    sys.modules.pop("mopl.integrations.vllm", None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("two"), with_adapters())


@pytest.fixture
def registered(plugin, folder, tmp_path, monkeypatch):
    """Register the plugin with variables; return the server that found it."""

    def start(model=BASE, **variables):
        for name, value in {"ADAPTERS": str(folder), "CACHE": str(tmp_path / "cache"), **variables}.items():
            monkeypatch.setenv(f"MOPL_VLLM_{name}", value)
        plugin.register()
        return Server(plugin.LoRAResolverRegistry, model)

    return start


def ask(server, *names):
    async def all_of_them():
        return await asyncio.gather(*(server.resolve_lora(name) for name in names))

    return asyncio.run(all_of_them())


def test_the_entry_point_is_the_function_that_registers(plugin):
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    ((name, value),) = project["entry-points"]["vllm.general_plugins"].items()
    assert name == "mopl_lora_resolver"
    assert EntryPoint(name, value, "vllm.general_plugins").load() is plugin.register
    plugin.register()  # mopl is installed beside vLLM, and nothing is asked of it
    assert not plugin.LoRAResolverRegistry.resolvers


def test_a_name_gives_the_adapter_of_its_trade_off(registered, folder, tmp_path):
    server = registered()
    first, again, other, base, theirs = ask(server, "w=0.7,0.3", "w=0.7,0.3", "w=0,1", "helpful", "sql-adapter")
    assert first is again and base is None and theirs is None
    assert server.asked.count("w=0.7,0.3") == 1
    assert first.lora_name == "w=0.7,0.3" and Path(first.lora_path).parent.parent == tmp_path / "cache"
    for request, weights in ((first, [0.7, 0.3]), (other, [0, 1])):
        found = load_file(Path(request.lora_path) / "adapter_model.safetensors")
        _, wanted = AdapterFolder(folder).merged(weights)
        assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)
    config = json.loads((Path(first.lora_path) / "adapter_config.json").read_text())
    # What vLLM's PEFTHelper asks for: these are there, and no feature that it refuses.
    assert config["r"] == config["lora_alpha"] == 5 and isinstance(config["target_modules"], list)
    assert config["peft_type"] == "LORA" and config["base_model_name_or_path"] == BASE
    assert config["bias"] == "none" and not (config["modules_to_save"] or config["use_dora"] or config["use_rslora"])


def test_numbers_are_stable_and_never_shared(plugin, registered):
    registered()
    (resolver,) = plugin.LoRAResolverRegistry.resolvers.values()

    async def numbers():
        names = [f"w={i / 20:g},{1 - i / 20:g}" for i in range(21)] * 2
        return [(name, (await resolver.resolve_lora(BASE, name)).lora_int_id) for name in names]

    found = asyncio.run(numbers())
    assert len(set(found)) == 21 == len({number for _, number in found})
    assert all(2**30 <= number < 2**31 for _, number in found)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("w=0.7", "model is 'w=0.7': it has 1 weight but must have 2, such as 'w=0.5,0.5'"),
        ("w=0.7,0.4", "must lie on the simplex but does not sum to 1"),
        ("w=nan,1", "'nan' is no decimal number"),
        ("w=../../x,1", "is no decimal number"),
        ("w=0.70,0.30", "model is 'w=0.70,0.30', which is the trade-off 'w=0.7,0.3'; write it so"),
        ("w=0.7, 0.3", "which is the trade-off 'w=0.7,0.3'; write it so"),
        ("w=0.70000001,0.29999999", "which is the trade-off 'w=0.7,0.3'; write it so"),
    ],
)
def test_a_bad_name_is_a_value_error_which_vllm_answers_with_400(registered, tmp_path, name, said):
    server = registered()
    with pytest.raises(ValueError, match=said):
        ask(server, name)
    assert not server.requests and not list((tmp_path / "cache").glob("*/w=*"))


def test_decimals_and_the_number_of_trade_offs_are_bounded(registered):
    server = registered(DECIMALS="1", MAX_ADAPTERS="2")
    with pytest.raises(ValueError, match=r"model is 'w=0.72,0.28' but .* takes 1 decimals; ask for 'w=0.7,0.3'"):
        ask(server, "w=0.72,0.28")
    ask(server, "w=0.7,0.3", "w=1,0")
    with pytest.raises(ValueError, match=r"2 trade-offs are in use and .* may hold 2"):
        ask(server, "w=0.5,0.5")
    assert all(Path(request.lora_path).is_dir() for request in server.requests.values())


@pytest.mark.parametrize(
    ("decimals", "name", "near"),
    [(1, "w=0.45,0.55", "w=0.5,0.5"), (0, "w=0.5,0.5", "w=1,0"), (2, "w=0.333,0.667", "w=0.33,0.67"),
     (2, "w=0.999,0.001", "w=1,0"), (5, "w=0.333333,0.666667", "w=0.33333,0.66667")],
)  # fmt: skip
def test_the_trade_off_that_is_named_instead_is_one_that_is_served(registered, decimals, name, near):
    server = registered(DECIMALS=str(decimals))
    with pytest.raises(ValueError, match=f"ask for '{near}'"):
        ask(server, name)
    assert ask(server, near)[0].lora_name == near


def test_the_base_model_must_be_that_of_the_adapters(plugin, registered, folder, tmp_path):
    with pytest.raises(ValueError, match=f"are for '{BASE}' but this server has 'some/other'; start it with that mod"):
        ask(registered("some/other"), "w=0.7,0.3")
    assert ask(registered("copies/tiny", BASE_MODEL="copies/tiny"), "w=0.7,0.3")[0] is not None
    unnamed = write(tmp_path / "unnamed", with_adapters(), base=None)
    with pytest.raises(ValueError, match="a base model that has no name, since it was a local folder; set MOPL"):
        plugin.TradeOffResolver(plugin.AdapterCache(AdapterFolder(unnamed), tmp_path / "other"))
    assert ask(registered("local", ADAPTERS=str(unnamed), BASE_MODEL="local"), "w=0.7,0.3")[0] is not None


def test_the_event_loop_goes_on_while_an_adapter_is_made(plugin, registered):
    server = registered()
    (resolver,) = plugin.LoRAResolverRegistry.resolvers.values()
    entered, free = threading.Event(), threading.Event()
    get = resolver.cache.get

    def slow(weights):
        entered.set()
        assert free.wait(60) and threading.current_thread() is not threading.main_thread()
        return get(weights)

    resolver.cache.get = slow

    async def meanwhile():
        task = asyncio.create_task(server.resolve_lora("w=0.4,0.6"))
        while not entered.is_set():
            await asyncio.sleep(0.001)
        assert await server.resolve_lora("other") is None  # answered while the adapter is being made
        free.set()
        return await task

    assert asyncio.run(meanwhile()).lora_name == "w=0.4,0.6"


def test_what_would_not_work_ends_the_start(plugin, registered, tmp_path, monkeypatch):
    for variable, value in (("MAX_ADAPTERS", "0"), ("MAX_ADAPTERS", "many"), ("DECIMALS", "-1"), ("DECIMALS", "٣")):
        with pytest.raises(ValueError, match=f"MOPL_VLLM_{variable} is .* but must be a whole number from"):
            registered(**{variable: value})
        monkeypatch.delenv(f"MOPL_VLLM_{variable}")
    with pytest.raises(FileNotFoundError, match="is no folder; make the folder again by `mopl export RUN --adapters"):
        registered(ADAPTERS=str(tmp_path / "nowhere"))
    sys.modules["vllm.envs"].VLLM_ALLOW_RUNTIME_LORA_UPDATING = False
    with pytest.raises(ValueError, match="so vLLM would never ask for a trade-off; set it to 1, or unset MOPL_VLLM_AD"):
        registered()


@pytest.mark.parametrize(("ranks", "least"), [((2, 3), 8), ((8, 8), 16), ((16, 17), 64), ((256, 256), 512)])
def test_the_rank_that_vllm_must_be_started_with(plugin, tmp_path, ranks, least):
    adapters = AdapterFolder(write(tmp_path / "ranks", with_adapters(ranks)))
    assert plugin.TradeOffResolver(plugin.AdapterCache(adapters, tmp_path / "cache")).max_lora_rank == least


def test_ranks_beyond_those_of_vllm_are_refused(plugin, tmp_path):
    adapters = AdapterFolder(write(tmp_path / "ranks", with_adapters((256, 257))))
    with pytest.raises(ValueError, match="has rank 513 but vLLM's --max-lora-rank ends at 512; train adapters of a sm"):
        plugin.TradeOffResolver(plugin.AdapterCache(adapters, tmp_path / "cache"))


def test_the_cache_is_that_of_mopl_by_default(plugin, monkeypatch):
    monkeypatch.setenv("MOPL_CACHE", "/somewhere")
    monkeypatch.setattr(Path, "home", lambda: 1 / 0)
    assert plugin._cache_folder() == Path("/somewhere/vllm-adapters")
