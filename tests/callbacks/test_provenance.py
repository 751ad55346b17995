import json
import subprocess

from lightning.pytorch.loggers.logger import DummyLogger

from fastvlm import identity
from fastvlm.callbacks.provenance import Provenance, read_git


class Recorder(DummyLogger):
    def __init__(self):
        super().__init__()
        self.params, self.tags, self.files = {}, {}, []

    def log_hyperparams(self, params):
        self.params |= params

    def set_tags(self, tags):
        self.tags |= tags

    def log_file(self, path, folder=None):
        self.files.append(path.name)


def test_a_stage_says_what_made_it(fit, tmp_path):
    logger = Recorder()
    fit(1, [Provenance(config={"lr": 1e-3}, seeds={"seed": 7}, tags={"stage.hash": "abc"})], logger=logger)
    stored = json.loads((tmp_path / "provenance.json").read_text())
    assert stored["config"] == {"lr": 1e-3} and stored["seeds"] == {"seed": 7} and stored["stage"] == "tiny"
    assert stored["versions"]["torch"] and stored["hardware"]["cores"] >= 1 and stored["hardware"]["cpu"]
    assert logger.params == {"lr": 1e-3} and logger.files == ["provenance.json"]
    assert logger.tags["seed.seed"] == 7 and logger.tags["stage.hash"] == "abc" and logger.tags["command"]


def test_a_resumed_stage_keeps_what_earlier_attempts_wrote(fit, tmp_path):
    fit(1, [Provenance(config={"lr": 1})])
    trainer = fit(2, [])
    Provenance(config={"lr": 2}).on_train_start(trainer, trainer.lightning_module)
    stored = json.loads((tmp_path / "provenance.json").read_text())
    assert stored["started_at_step"] == 2 and stored["config"] == {"lr": 2}
    assert [before["started_at_step"] for before in stored["earlier"]] == [0]


def test_commit_and_local_changes(tmp_path):
    assert read_git(tmp_path)["commit"] is None
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org"]
    (tmp_path / "file").write_text("1")
    for command in (["init", "-q"], ["add", "file"], ["commit", "-qm", "one"]):
        subprocess.run([*git, *command], cwd=tmp_path, check=True)
    clean = read_git(tmp_path)
    assert len(clean["commit"]) == 40 and clean["dirty"] is False
    (tmp_path / "file").write_text("2")
    assert read_git(tmp_path)["dirty"] is True


def test_pages_a_study_has_written_do_not_make_the_code_another(tmp_path, monkeypatch):
    monkeypatch.setattr(identity, "ROOT", tmp_path)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org"]
    page = tmp_path / "experiments" / "one" / "README.md"
    page.parent.mkdir(parents=True)
    page.write_text("not run")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run([*git, *command], cwd=tmp_path, check=True)
    head = identity.commit.__wrapped__()
    page.write_text("run")
    (page.parent / "results.csv").write_text("")
    assert len(head) == 40 and identity.commit.__wrapped__() == head
    (page.parent / "study.yaml").write_text("")
    assert identity.commit.__wrapped__() == head + "-dirty"
