"""One command's options out of conf/, its dataclass and words: what hydra.compose gives, without what it spends on itself.

Of its time two thirds go to settings of Hydra's own (how it logs, where it writes, how it sweeps), which are composed with every
config and then thrown away, and to copies of every command's options. Here neither is made. The steps are those of Hydra's
ConfigLoaderImpl._load_configuration_impl, whose version pyproject.toml pins.
"""

from functools import cache
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.defaults_list import create_defaults_list
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import OmegaConf


class _Store(ConfigStore):
    """Is never changed by who reads it: `load` copies what it gives."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Store":
        return self


@cache
def keep_options(name: str, config_class: type) -> None:
    """Have Hydra know a command's options as NAME_options, which its file in conf/ begins with."""
    store = ConfigStore.instance()
    store.__class__ = _Store
    store.store(name=f"{name}_options", node=config_class)


def composed(name: str, words: list[str]) -> Any:
    """The config of these words, none of which is Hydra's own. Raises Hydra's and OmegaConf's errors."""
    loader = GlobalHydra.instance().config_loader()
    loader.ensure_main_config_source_available()
    overrides, files = loader._parse_overrides_and_create_caching_repo(name, words)
    loader.validate_sweep_overrides_legal(overrides=overrides, run_mode=RunMode.RUN, from_shell=False)
    presets = create_defaults_list(files, name, overrides, prepend_hydra=False, skip_missing=False)
    config = loader._compose_config_from_defaults_list(defaults=presets.defaults, repo=files)
    OmegaConf.set_struct(config, True)
    ConfigLoaderImpl._apply_overrides_to_config(presets.config_overrides, config)
    return config
