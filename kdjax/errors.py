"""Errors that a user can cause. Commands print them as one line and exit with code 2."""


class UserError(Exception):
  """What is wrong, where, and how to mend it, in one line."""


class ConfigError(UserError):
  """Every mistake found in a config, one line each."""

  def __init__(self, problems: list[str]):
    self.problems = problems
    super().__init__('\n'.join(f'config error: {p}' for p in problems))


class SourceGone(UserError):
  """A source of text cannot be found now: moved, deleted, not mounted, not fetched."""


class TrainingError(UserError):
  """A run that cannot go on (a non-finite loss, a lost folder). Its last good checkpoint stands."""


class OwnedError(UserError):
  """A live process is at work in a folder."""


class ProcessLost(UserError):
  """Another process of the job is gone."""
