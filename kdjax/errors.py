"""Errors that a user can cause, and the exit codes of commands. Commands print an error as one line."""

FAILED = 1  # a run cannot continue; restarting it unchanged does not help
WRONG = 2  # the command line, the config or a file is wrong
TEMPORARY = 75  # EX_TEMPFAIL: unfinished; the same command resumes it
STOPPED = 130  # 128 + SIGINT: stopped by the user
NO_READER = 141  # 128 + SIGPIPE: nobody reads the output


class UserError(Exception):
  """Says in one line (or one line for each of several problems) what is wrong, where, and how to fix it.

  Control characters in the names and values that a line quotes are escaped.
  """

  def __init__(self, *lines: str):
    super().__init__('\n'.join(map(_escape, lines)))


class ConfigError(UserError):
  """Every mistake found in a config, one line each."""

  def __init__(self, problems: list[str]):
    self.problems = [_escape(problem) for problem in problems]
    super().__init__(*(f'config error: {problem}' for problem in problems))


class SourceGone(UserError):
  """A source of text cannot be found: it was moved or deleted, or is not mounted or downloaded."""


class TrainingError(UserError):
  """A run that cannot go on (a non-finite loss, a lost folder). Its last good checkpoint stands."""


class StoreUnavailable(OSError):
  """An object store has not answered for minutes. What was saved before is whole, and the same command resumes it."""


class OwnedError(UserError):
  """A live process is at work in a folder."""


class ProcessLost(UserError):
  """Another process of the job is gone."""


def _escape(text: str) -> str:
  return text if text.isprintable() else ''.join(c if c.isprintable() else repr(c)[1:-1] for c in text)
