"""Reading ahead."""

import contextlib
import queue
import threading
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar('T')


def ahead(items: Iterable[T]) -> Iterator[T]:
  """The items, each made on another thread while the one before is used."""
  ready: queue.Queue = queue.Queue(maxsize=1)
  stop = threading.Event()

  def put(what: tuple[str, Any]) -> None:
    while not stop.is_set():
      with contextlib.suppress(queue.Full):
        ready.put(what, timeout=0.1)
        return

  def read() -> None:
    try:
      for item in items:
        put(('item', item))
        if stop.is_set():
          return
      put(('end', None))
    except BaseException as error:  # raised where the item was to come
      put(('error', error))

  thread = threading.Thread(target=read, daemon=True)
  thread.start()
  try:
    while True:
      kind, value = ready.get()
      if kind == 'error':
        raise value
      if kind == 'end':
        return
      yield value
  finally:
    stop.set()
    thread.join()
