"""A command's options are what Hydra itself would compose, and so are its complaints."""

import hydra
import pytest
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import OmegaConf

from minitron_megatron.cli.commands import COMMANDS
from minitron_megatron.cli.composed import composed, keep_options
from minitron_megatron.launcher import CONF

# Words that are options of every command or of none, and of some: what is added, nested, quoted, deleted, wrong.
WORDS = (
    [],
    ["output=x"],
    ["seed=3", "++output='a b'"],
    ["+a={b:[1,x,null]}", "+c.d=1.5"],
    ["seed=abc"],
    ["nonsense=1"],
    ["+seed=3"],
    ["~seed"],
    ["model=nosuch"],
    ["model=llama3_1_8b"],
    ["cluster=h100"],
    ["+experiment=mn_minitron_8b"],
    ["optim=mn_minitron_8b", "optim.lr=3e-5"],
    ["data.sequence_length=1,2"],
    ["output=[x"],
)


def what(compose):
    """The config, with its types and whether keys may be added; or the complaint and its causes."""
    try:
        config = compose()
    except HydraException as error:
        return type(error), str(error), str(error.__cause__)
    return OmegaConf.to_container(config), OmegaConf.get_type(config), OmegaConf.is_struct(config), str(config)


@pytest.mark.parametrize("name", COMMANDS)
def test_options_are_those_that_hydra_composes(name):
    keep_options(name, COMMANDS[name].config)
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        for words in WORDS:
            ours = what(lambda words=words: composed(name, words))
            assert ours == what(lambda words=words: hydra.compose(name, words)), words


def test_options_are_read_from_one_store_and_never_changed_there():
    keep_options("prune", COMMANDS["prune"].config)
    store = ConfigStore.instance()
    before = OmegaConf.to_yaml(store.repo["prune_options.yaml"].node)
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        assert composed("prune", ["seed=7"]).seed == 7
        assert composed("prune", []).seed != 7
    keep_options("prune", COMMANDS["prune"].config)
    assert ConfigStore.instance() is store and OmegaConf.to_yaml(store.repo["prune_options.yaml"].node) == before
