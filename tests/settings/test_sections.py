"""configs/default.py shows the keys and defaults that the sections have."""

import dataclasses

import pytest

from lorapr_jax.settings.files import read_config
from lorapr_jax.settings.model import LoraSettings, ModelSettings, PruneSettings
from lorapr_jax.settings.sections import (
  DataSettings,
  ExportSettings,
  LogSettings,
  MeshSettings,
  RecoverSettings,
  ReportSettings,
  TrainSettings,
)

SECTIONS = {
  'model': ModelSettings,
  'data': DataSettings,
  'lora': LoraSettings,
  'train': TrainSettings,
  'prune': PruneSettings,
  'recover': RecoverSettings,
  'mesh': MeshSettings,
  'export': ExportSettings,
  'log': LogSettings,
  'report': ReportSettings,
}
# What every run must be given.
REQUIRED = {
  'model': {'sizes': {'model_type': 'llama'}},
  'data': {'train': 'synthetic:0'},
}


def test_every_section_has_its_dataclass():
  assert read_config('default').to_dict().keys() == SECTIONS.keys()


@pytest.mark.parametrize('name', SECTIONS)
def test_keys_and_defaults_are_those_of_the_dataclass(name):
  shown = read_config('default')[name].to_dict()
  required = REQUIRED.get(name, {})
  section = dataclasses.asdict(SECTIONS[name](**required))
  assert section | {key: shown[key] for key in required} == shown
