import pytest

from kdjax import convert, generate
from kdjax.data.tokenizer import Tokenizer
from kdjax.runtime import sharding
from kdjax.teachers import by_name
from tests.teachers.huggingface import shapes
from tests.teachers.huggingface.folders import make


def text(capsys, *argv) -> str:
  generate.main([str(arg) for arg in argv])
  return capsys.readouterr().out


def test_a_run_goes_on_from_a_prompt(main_job, capsys):
  (run,) = (main_job / 'runs').glob('tiny-*/students/distilled')
  out = text(capsys, run, 'Once more', '--max-tokens', 12, '--temperature', 0)
  assert out.startswith('Once more') and len(out.encode()) > len('Once more')
  assert text(capsys, run, 'Once more', '--max-tokens', 12, '--temperature', 0) == out
  one, other = (text(capsys, run, 'Once', '--max-tokens', 12, '--seed', seed) for seed in (1, 2))
  assert one != other and text(capsys, run, 'Once', '--max-tokens', 12, '--seed', 1) == one


def test_the_greatest_seed_and_as_many_tokens_as_there_are_draw_a_text(main_job, capsys):
  (run,) = (main_job / 'runs').glob('tiny-*/students/distilled')
  options = ('So', '--max-tokens', 4, '--seed', 2**32 - 1, '--samples', 2, '--top-k', 10**18)
  assert text(capsys, run, *options).count('So') >= 2
  assert text(capsys, run, '', '--max-tokens', 4, '--temperature', 1e6)


def test_an_experiments_students_stand_side_by_side(main_job, capsys):
  (experiment,) = (path.parent for path in (main_job / 'runs').glob('tiny-*/experiment.json'))
  out = text(capsys, experiment, 'So', '--max-tokens', 4, '--samples', 2)
  titles = [line for line in out.splitlines() if line.startswith('---')]
  assert titles == [f'--- {arm} {k}' for arm in ('baseline', 'distilled', 'unigram') for k in (1, 2)]


def test_a_hugging_face_folder_is_read_where_it_is(tmp_path, capsys):
  folder = make(tmp_path / 'model')
  convert.main(['from-hf', str(folder), str(tmp_path / 'run')])
  capsys.readouterr()
  options = ('ab', '--temperature', 0, '--max-tokens', 8)
  assert text(capsys, folder, *options) == text(capsys, tmp_path / 'run', *options)


def test_a_character_is_shown_when_all_its_bytes_are_there():
  tokenizer, euro = Tokenizer(), list('a€'.encode())
  assert [generate._whole(tokenizer, euro[:n]) for n in range(1, 5)] == ['a', 'a', 'a', 'a€']


def test_special_tokens_in_a_prompt_are_text_unless_asked_for():
  tokenizer = Tokenizer()
  (plain,), (special,) = (tokenizer.encode_batch(['a<|endoftext|>'], special=s).copy() for s in (False, True))
  assert len(plain) == 14 and special.tolist() == [97, 256]


def test_a_prompt_begins_with_the_beginning_token_once(tmp_path):
  folder = shapes.make(tmp_path / 'x', 'Llama 2')
  opened = by_name.open_model(str(folder), sharding.one_device())
  assert generate.prompt_ids(opened, 'ab')[0] == 1 and len(generate.prompt_ids(opened, '<s>')) == 4
  assert generate.prompt_ids(opened, '<s>ab', special=True) == generate.prompt_ids(opened, 'ab', special=True)
  assert generate.prompt_ids(opened, '') == [1]


@pytest.mark.parametrize(
  ('argv', 'line'),
  [
    (['{t}/none'], 'no such folder'),
    (['{t}'], 'is no Hugging Face folder: it has no config.json'),
    (['{run}', '--step', '99'], 'has no checkpoint of step 99; it has'),
    (['{run}', '--temperature', '-1'], 'temperature: must be 0 (greedy) or above'),
    (['{run}', '--temperature', 'nan'], 'temperature: must be 0 (greedy) or above 1e-6 and up to 1e6, got nan'),
    (['{run}', '--top-p', '0'], 'top-p: must be in (0, 1], got 0'),
    (['{run}', '--seed', '99999999999999999999'], 'seed: must be below 4,294,967,296, got 99999999999999999999'),
    (['{run}', '--seed', '-1'], 'seed: must be at least 0, got -1'),
    (['{run}', '--max-tokens', '99999999999999999999'], 'must be below'),
    (['{run}', '--max-tokens', '999999999999999999'], 'more than the model can see at once'),
    (['{run}', '--step', '999999999999999999'], 'has no checkpoint of step 999999999999999999'),
    (['{run}', 'caf\udce9'], r"PROMPT: must be UTF-8 text, got 'caf\udce9'"),
    (['{run}', '--max-tokens', '0'], 'must be at least 1, got 0'),
    (['{run}', '--max-tokens', '9000'], 'more than the model can see at once'),
  ],
)
def test_mistakes_are_one_line(argv, line, main_job, tmp_path, capsys):
  (run,) = (main_job / 'runs').glob('tiny-*/students/distilled')
  with pytest.raises(SystemExit) as e:
    generate.main([arg.format(t=tmp_path, run=run) for arg in argv])
  assert e.value.code == 2
  assert line in capsys.readouterr().err.strip().splitlines()[-1]
