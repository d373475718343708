"""Google Cloud Storage for every library that opens gs:// through fsspec: one place that knows the store's errors.

gcsfs retries a request for half a minute and then raises errors that are no OSError, which no caller expects. Here each request is retried
for PATIENCE seconds; an error that lasts longer is raised as StoreUnavailable and any other as OSError. Once the store has been unavailable for
that long, requests are tried once each until one succeeds, so that a run which cannot save ends soon.
"""

import asyncio
import logging
import random
import threading
import time
from typing import Any

import aiohttp
import gcsfs
import gcsfs.core
import requests.exceptions
from gcsfs.retry import HttpError, is_retriable
from google.auth import exceptions as auth

from kdjax.errors import StoreUnavailable
from kdjax.storage import paths

log = logging.getLogger('kdjax')

PATIENCE = 180.0  # seconds
LONGEST_PAUSE = 16.0  # seconds between two tries
CLIENT_ERRORS = (
  HttpError,
  aiohttp.ClientError,
  asyncio.TimeoutError,
  requests.exceptions.RequestException,
  auth.GoogleAuthError,
)


class CloudStorage(gcsfs.GCSFileSystem):
  """gcsfs with longer patience, and errors that are OSErrors."""

  _unavailable = False  # whether a request has been given up and none has succeeded since

  async def _request(self, method: str, path: str, *args: Any, **kwargs: Any) -> Any:
    since, pause, reported = time.monotonic(), 1.0, False
    while True:
      try:
        found = await gcsfs.core.GCSFileSystem._request.__wrapped__(self, method, path, *args, **kwargs)
      except CLIENT_ERRORS as e:
        if not _may_pass(e):
          raise OSError(paths.describe_error(e)) from e
        if self._unavailable or time.monotonic() - since + pause > PATIENCE:
          CloudStorage._unavailable = True
          raise StoreUnavailable(f'the store does not answer ({paths.describe_error(e)})') from e
        if not reported:
          _report(
            logging.WARNING,
            'the store does not answer (%s); trying again for up to %.0f s',
            paths.describe_error(e),
            PATIENCE,
          )
        reported = True
        await asyncio.sleep(pause * random.uniform(0.8, 1.2))
        pause = min(2 * pause, LONGEST_PAUSE)
        continue
      CloudStorage._unavailable = False
      if reported:
        _report(logging.INFO, 'the store answers again after %.0f s', time.monotonic() - since)
      return found


def _may_pass(error: Exception) -> bool:
  """Return whether an error may pass: the store is overloaded, down or out of reach, or credentials are being renewed."""
  if isinstance(error, HttpError) and str(error.code) == '401':
    return True
  passing = (aiohttp.ClientError, asyncio.TimeoutError, auth.TransportError, auth.RefreshError)
  return isinstance(error, passing) or is_retriable(error)


def _report(level: int, message: str, *values: Any) -> None:
  """Log from a thread of its own: this one serves all requests, and a log file may be waiting for one of them."""
  threading.Thread(target=log.log, args=(level, message, *values), daemon=True).start()
