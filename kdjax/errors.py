"""Errors that a user can cause, and the exit codes of commands. Commands print an error as one line."""

FAILED = 1  # a run cannot continue; restarting it unchanged does not help
WRONG = 2  # the command line, the config or a file is wrong
TEMPORARY = 75  # EX_TEMPFAIL: unfinished; the same command resumes it
STOPPED = 130  # 128 + SIGINT: stopped by the user
NO_READER = 141  # 128 + SIGPIPE: nobody reads the output


class UserError(Exception):
  """Says in one line what is wrong, where, and how to fix it."""


class ConfigError(UserError):
  """Every mistake found in a config, one line each."""

  def __init__(self, problems: list[str]):
    self.problems = problems
    super().__init__('\n'.join(f'config error: {p}' for p in problems))


class SourceGone(UserError):
  """A source of text cannot be found: it was moved or deleted, or is not mounted or downloaded."""


class TrainingError(UserError):
  """A run that cannot go on (a non-finite loss, a lost folder). Its last good checkpoint stands."""


class OwnedError(UserError):
  """A live process is at work in a folder."""


class ProcessLost(UserError):
  """Another process of the job is gone."""
