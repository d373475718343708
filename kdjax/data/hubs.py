"""Datasets by name: `tfds:NAME/config:split`, prepared as ArrayRecord, read without TensorFlow; `hf:NAME:config:split` through `datasets`.

What is not on this machine is fetched by the libraries themselves where they can; where they cannot, that is said at once.
"""

import contextlib
import importlib
import os
import pathlib
import re
import socket
import urllib.parse
from collections.abc import Iterator
from typing import Any

from kdjax.data.records import NullText, field_of, fields_of
from kdjax.errors import SourceGone, UserError
from kdjax.storage import paths

TFDS, HF = 'tfds:', 'hf:'
_BATCH = 256
_TFDS_NAME = re.compile(r'(?P<name>.*?)(?::(?P<version>\d+\.\d+\.\d+))?(?::(?P<split>[A-Za-z_][^:]*(?:\[[^\]]*\])?))?')


class TfdsSplit:
  """`tfds:NAME[/config][:version][:split]`; NAME may be the folder of a prepared dataset. The folder of all: TFDS_DATA_DIR."""

  def __init__(self, name: str):
    found = _TFDS_NAME.fullmatch(name.removeprefix(TFDS))
    assert found is not None
    self.name, self._split = name, found['split'] or 'train'
    self._builder = self._open(found['name'], found['version'])
    if self._builder.info.file_format is None or self._builder.info.file_format.value not in (
      'array_record',
      'parquet',
    ):
      raise UserError(
        f"{name}: the dataset is prepared as {_format(self._builder)}; prepare it with file_format='array_record', which is read without TensorFlow"
      )
    try:
      self._source = self._builder.as_data_source(self._split)
    except Exception as e:  # of a split, whatever TFDS raises
      raise UserError(f'{name}: {_line(e)}; splits: {", ".join(self._builder.info.splits)}') from None

  def _open(self, name: str, version: str | None) -> Any:
    tfds = importlib.import_module('tensorflow_datasets')
    try:
      if os.path.isdir(paths.expand(name)):
        return tfds.builder_from_directory(paths.expand(name))
      builder = tfds.builder(f'{name}:{version}' if version else name, try_gcs=False)
    except Exception as e:
      raise SourceGone(
        f'{self.name}: {_line(e)}; give NAME/config:split of a dataset that is prepared in {_data_dir()}'
      ) from None
    if not builder.info.splits:
      raise SourceGone(
        f"{self.name} is not prepared in {_data_dir()}; run tfds.builder({name!r}, file_format='array_record').download_and_prepare() "
        'where there is a network, or set TFDS_DATA_DIR'
      )
    return builder

  def stamp(self) -> tuple:
    info = self._builder.info
    files = [pathlib.Path(path) for split in info.splits.values() for path in split.filepaths]
    return info.full_name, self._split, [(path.name, path.stat().st_size) for path in files if path.exists()]

  def texts(self, text_field: str) -> Iterator[str | NullText]:
    for first in range(0, len(self._source), _BATCH):
      last = min(first + _BATCH, len(self._source))
      for number, record in enumerate(self._source.__getitems__(range(first, last)), first):
        yield field_of(record, text_field, f'{self.name}, example {number}')


class HfSplit:
  """`hf:NAME[:config][:split]`, NAME a dataset of the hub or a local folder of Parquet, JSON or text files; streamed."""

  def __init__(self, name: str):
    path, *rest = name.removeprefix(HF).split(':')
    self.name = name
    self._config, self._split = (rest[0] if len(rest) > 1 else None), (rest[-1] if rest else 'train')
    if not path:
      raise UserError(f'{name} names no dataset; give hf:NAME:config:split of one of the hub, or hf:FOLDER')
    if os.path.exists(os.path.join(paths.expand(path), 'state.json')):
      raise UserError(f'{name} was written by save_to_disk; write it as Parquet (its to_parquet) and give that file')
    datasets = self._library(path)
    try:
      self._builder = datasets.load_dataset_builder(paths.expand(path), self._config)
      self._data = datasets.load_dataset(paths.expand(path), self._config, split=self._split, streaming=True)
    except Exception as e:
      raise SourceGone(
        f'{name}: {_line(e)}; give hf:NAME:config:split of a dataset of the hub, or of a local folder'
      ) from None

  def _library(self, path: str) -> Any:
    try:
      datasets, hub = importlib.import_module('datasets'), importlib.import_module('huggingface_hub')
    except ImportError:
      raise SourceGone(f"{self.name}: the package datasets is not installed; run: pip install 'kdjax[hf]'") from None
    datasets.disable_progress_bars()
    if not os.path.isdir(paths.expand(path)) and not _hub_answers():
      # What has been fetched before is still found; else it is said now, and not after half a minute of retries.
      hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    return datasets

  def stamp(self) -> tuple:
    builder = self._builder
    files = [str(file) for split in (builder.config.data_files or {}).values() for file in split]
    local = [
      (pathlib.Path(file).name, os.stat(file).st_size, os.stat(file).st_mtime_ns)
      for file in files
      if os.path.isfile(file)
    ]
    return (
      builder.dataset_name,
      builder.config.name,
      str(builder.config.version),
      builder.hash,
      self._split,
      files if not local else [],
      local,
    )

  def texts(self, text_field: str) -> Iterator[str | NullText]:
    columns = self._data.column_names
    if columns is not None and text_field not in columns:
      raise UserError(f'{self.name}: no column {text_field!r}; {fields_of(columns)}')
    data = self._data.select_columns([text_field]) if columns is not None else self._data
    iterator = enumerate(data)
    while True:
      try:
        item = next(iterator, None)
      except Exception as e:  # of a file or the network, whatever the library raises
        raise UserError(f'{self.name}: cannot be read on ({_line(e)}); run again, or fetch the files first') from None
      if item is None:
        return
      number, record = item
      yield field_of(record, text_field, f'{self.name}, example {number}')


def _hub_answers() -> bool:
  """Return whether the hub can be reached: the library itself would try for half a minute."""
  endpoint = urllib.parse.urlparse(os.environ.get('HF_ENDPOINT', 'https://huggingface.co'))
  with contextlib.suppress(OSError), socket.create_connection((endpoint.hostname, endpoint.port or 443), timeout=5):
    return True
  return bool(os.environ.get('HTTPS_PROXY') or os.environ.get('https_proxy'))


def _data_dir() -> str:
  return os.environ.get('TFDS_DATA_DIR', '~/tensorflow_datasets')


def _format(builder: Any) -> str:
  return builder.info.file_format.value if builder.info.file_format else 'something unknown'


def _line(error: Exception) -> str:
  """The gist of a library's error: some go on for pages."""
  return f'{type(error).__name__}: {" ".join(str(error).split())[:200]}'
