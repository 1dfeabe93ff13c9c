"""Scores equal a plain reference on transformers' own modules, in every layout and aggregation."""

import itertools

import numpy as np
import pytest
import torch

from minitron_megatron.checkpoints.folder import open_model_folder
from minitron_megatron.data.datasets import open_data, training_samples
from minitron_megatron.importance.statistics import AGGREGATIONS
from tests import jobs, reference
from tests.test_models import LAYOUTS, names
from tests.tiny import data_folder, hf_model, imported

SAMPLES = 5


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """(transformers model, model folder, data folder, the calibration samples)."""
    folder = tmp_path_factory.mktemp("importance")
    model = hf_model()
    path = imported(model, folder)
    data = data_folder(folder, path)
    shape = open_model_folder(path).shape
    samples = training_samples(
        open_data(str(data), "train", shape, 32), "train", sequence_length=32, seed=1234, count=SAMPLES
    )
    return model, path, data, [samples[i]["tokens"] for i in range(SAMPLES)]


def compare(found: dict[str, torch.Tensor], wanted: dict[str, np.ndarray]) -> None:
    assert set(found) == set(wanted)
    for name, score in wanted.items():
        error = np.abs(found[name].numpy() - score).max() / np.abs(score).max()
        assert error <= 1e-5, (name, error)


@pytest.mark.parametrize(("ranks", "layout"), LAYOUTS, ids=names)
def test_scores_are_the_same_in_every_layout(gloo, measured, ranks, layout):
    """Five samples in micro-batches of two: the last round is filled up, on every data-parallel rank."""
    model, path, data, samples = measured
    found = gloo(ranks, jobs.scores, str(path), str(data), layout, SAMPLES, 2, ("mean", "l2"), layout=layout)
    assert all(rest is None for rest in found[1:])
    compare(found[0], reference.importance(model, samples, "mean", "l2"))


@pytest.mark.parametrize(("sequence", "batch"), list(itertools.product(AGGREGATIONS, AGGREGATIONS)))
def test_every_aggregation(gloo, measured, sequence, batch):
    model, path, data, samples = measured
    layout = {"tensor": 2, "sequence": True}
    found = gloo(2, jobs.scores, str(path), str(data), layout, SAMPLES, 1, (sequence, batch), layout=layout)
    compare(found[0], reference.importance(model, samples, sequence, batch))
