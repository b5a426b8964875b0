"""Tests of the tests: a copy of the library with one safeguard taken out must fail the test that is there for it."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fork_run import record

ROOT = Path(__file__).resolve().parents[1]

# safeguard: module, what stands there, what stands there instead, the test that must notice
MUTANTS = {
    'hashes of the manifest are compared': ('checkpoints', "return [] if _sha256(path) == entry['sha256'] else", "return [] if True else", 'test_damage.py::test_damage_is_found'),
    'files are flushed before the name': ('checkpoints', 'os.fsync(fd)', 'None', 'test_damage.py::test_everything_is_on_the_disk_before_the_name'),
    'written beside, then renamed': ('checkpoints', "stage, final = folder/f'.tmp-{step}', folder/f'checkpoint-{step}'", "stage, final = folder/f'checkpoint-{step}', folder/f'checkpoint-{step}'", 'test_damage.py::test_everything_is_on_the_disk_before_the_name'),
    'two valid ones are kept': ('checkpoints', 'if valid == keep:', 'if valid == 1:', 'test_damage.py::test_rotation_keeps_two_valid_ones'),
    'the run a checkpoint belongs to': ('checkpoints', "if run_id and manifest.get('run') not in (None, run_id)", 'if False', 'test_damage.py::test_a_stale_checkpoint_of_another_run_is_skipped'),
    'a full disk is told as such': ('checkpoints', 'raise disk_full(folder, final.name, written, sum(map(_bytes, checkpoints(folder)[-1:]))) from e', 'raise', 'test_damage.py::test_file_size_limit'),
    'the update of a NaN is skipped': ('guards', 'inner.found_inf = bad.float()', 'inner.found_inf = torch.zeros(())', 'test_exact.py::test_a_number_that_is_none_stops_the_run'),
    'a NaN is noticed': ('guards', 'if bad and not (np.isfinite(total) and self._is_overflow(bad, values, step)): raise self._error', 'if False: raise self._error', 'test_exact.py::test_a_number_that_is_none_stops_the_run'),
    'a loss that explodes is noticed': ('guards', 'if self.count < self.patience:', 'if True:', 'test_exact.py::test_a_loss_that_explodes_stops_the_run'),
    'settings are compared': ('resume', 'changes = changed_settings(old, facts, allow)', 'changes = {}', 'test_exact.py::test_a_changed_setting_is_refused'),
    'parts are asked for by name': ('resume', 'if missing: raise', 'if False: raise', 'test_exact.py::test_a_missing_part_is_not_gone_on_without'),
    'later epochs are shuffled by their number': ('loop', "random.Random(f'{self.seed}:{self.epoch}').shuffle(order)", 'random.shuffle(order)', 'test_exact.py::test_resumed_is_uninterrupted'),
    'an interrupt ends the run': ('guards', 'control.should_training_stop = True', 'pass', 'test_stop.py::test_interrupts'),
    'one process at a time': ('resume', "if run.status == 'running' and", 'if False and', 'test_stop.py::test_two_processes_do_not_share_a_run'),
    'headers are walked before they are believed': ('sources', 'check_gguf(file)\n', 'pass\n', 'test_hostile.py::test_hostile_gguf'),
    'a role is one of four words': ('conversation', 'if self.role not in ROLES:', 'if False:', 'test_injection.py::test_a_role_is_one_of_four_words'),
    'content is read without control tokens': ('tokens', 'content = _without_control(state, set(self.control.values()))', 'content = state', 'test_injection.py::test_no_control_token_from_content'),
    'a template is tried first': ('layouts', 'if why: refuse_template(', 'if False: refuse_template(', 'test_hostile.py::test_hostile_chat_template'),
    'pickles are refused by name': ('checkpoints', "'.bin', '.pkl'", "'.never'", 'test_hostile.py::test_code_files_are_refused'),
}


@pytest.mark.parametrize('safeguard', MUTANTS)
def test_the_safeguard_stands_there(safeguard):
    "The mutants themselves run only with --flags slow; that each still finds its line is seen at once."
    module, old, _, test = MUTANTS[safeguard]
    file, name = test.split('::')
    assert old in (ROOT/'llama_nb'/f'{module}.py').read_text(encoding='utf-8')
    assert f'def {name}(' in (ROOT/'tests'/file).read_text(encoding='utf-8')


@pytest.mark.slow
@pytest.mark.parametrize('safeguard', MUTANTS)
def test_a_missing_safeguard_is_noticed(safeguard, tmp_path):
    module, old, new, test = MUTANTS[safeguard]
    shutil.copytree(ROOT/'llama_nb', tmp_path/'llama_nb', ignore=shutil.ignore_patterns('__pycache__'))
    path = tmp_path/'llama_nb'/f'{module}.py'
    text = path.read_text(encoding='utf-8')
    assert old in text, f'{module} does not say {old!r} any more'
    path.write_text(text.replace(old, new), encoding='utf-8')
    env = {**os.environ, 'PYTHONPATH': str(tmp_path), 'LLAMA_NB_FIGURES': ''}
    done = subprocess.run([sys.executable, '-m', 'pytest', '-q', '-x', '-p', 'no:cacheprovider', str(ROOT/'tests'/test), '--basetemp', str(tmp_path/'base')], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and 'failed' in done.stdout, f'nobody noticed: {done.stdout[-1500:]}'
    record('mutants', safeguard=safeguard, noticed_by=test)
