"""An object store on this machine: an emulator of Cloud Storage, with what it lacks: generations of objects as conditions.

python -m tests.bucket PORT
"""

import contextlib
import http.server
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator

from tests import commands

BUCKET = 'kdjax-runs'


def environment(port: int) -> dict[str, str]:
  """How a process finds it: gcsfs, and TensorStore for the arrays of checkpoints."""
  address = f'http://127.0.0.1:{port}'
  return {'STORAGE_EMULATOR_HOST': address, 'TENSORSTORE_GCS_HTTP_URL': address}


@contextlib.contextmanager
def serving() -> Iterator[int]:
  """Its port."""
  port = commands.free_port()
  server = subprocess.Popen(
    [sys.executable, '-m', 'tests.bucket', str(port)], cwd=commands.REPO, stderr=subprocess.DEVNULL
  )
  try:
    for _ in range(200):
      with contextlib.suppress(OSError):
        urllib.request.urlopen(f'http://127.0.0.1:{port}/storage/v1/b/{BUCKET}', timeout=5).close()
        break
      time.sleep(0.1)
    yield port
  finally:
    server.kill()
    server.wait()


def begin_outage(port: int, seconds: float, status: int = 503) -> None:
  """Answer every request with this status for so many seconds from now; 0 ends an outage."""
  urllib.request.urlopen(f'http://127.0.0.1:{port}/outage?seconds={seconds}&status={status}', timeout=5).close()


def serve(port: int) -> None:
  from gcp_storage_emulator import server
  from gcp_storage_emulator.handlers import objects

  insert, upload, download, lock = objects.insert, objects.upload_partial, objects.download, threading.RLock()

  def generation(storage, bucket: str, name: str) -> str:
    with contextlib.suppress(Exception):
      return storage.get_file_obj(bucket, name)['generation']
    return '0'

  def checked(write):
    def handler(request, response, storage, *args, **kwargs):
      asked = request.query.get('ifGenerationMatch')
      if asked:
        name = (request.query.get('name') or [None])[0] or request.data['meta']['name']
        if asked != [generation(storage, request.params['bucket_name'], name)]:
          response.status = http.HTTPStatus.PRECONDITION_FAILED
          return
      write(request, response, storage, *args, **kwargs)

    return handler

  def checked_download(request, response, storage, *args, **kwargs):
    now = generation(storage, request.params['bucket_name'], request.params['object_id'])
    if request.query.get('ifGenerationNotMatch') == [now] and now != '0':
      response.status = http.HTTPStatus.NOT_MODIFIED
    elif request.query.get('ifGenerationMatch', [now]) != [now]:
      response.status = http.HTTPStatus.PRECONDITION_FAILED
    else:
      response['x-goog-generation'] = now
      download(request, response, storage, *args, **kwargs)

  outage = {'until': 0.0, 'status': http.HTTPStatus.SERVICE_UNAVAILABLE}

  def begin_outage(request, response, storage):
    outage['until'] = time.monotonic() + float(request.query['seconds'][0])
    outage['status'] = http.HTTPStatus(int(request.query['status'][0]))

  def one_at_a_time(handle):
    def handler(request, response, *args, **kwargs):
      if time.monotonic() < outage['until']:
        response.status = outage['status']
        return
      with lock:
        handle(request, response, *args, **kwargs)

    return handler

  mended = {insert: checked(insert), upload: checked(upload), download: checked_download}
  objects.insert, objects.upload_partial, objects.download = mended.values()
  for _, handlers in server.HANDLERS:
    handlers.update({method: one_at_a_time(mended.get(handler, handler)) for method, handler in handlers.items()})
  server.HANDLERS = ((r'^/outage$', {'GET': begin_outage}), *server.HANDLERS)
  server.server.HTTPServer = http.server.ThreadingHTTPServer  # its own takes one connection at a time
  server.create_server('127.0.0.1', port, in_memory=True, default_bucket=BUCKET).run()


if __name__ == '__main__':
  serve(int(sys.argv[1]))
