"""Running notebooks: parameters that do not exist, cells that fail, kernels that die."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from persodpo import reproduce, stages
from persodpo.errors import PersodpoError
from persodpo.files import PROJECT, is_running
from persodpo.runfolder import RunFolder


def write(path, *cells, tags=("parameters",)):
    book = nbformat.v4.new_notebook()
    book.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    for number, source in enumerate(cells):
        cell = nbformat.v4.new_code_cell(source, id=f"cell-{number}")
        if number == 0:
            cell.metadata["tags"] = list(tags)
        book.cells.append(cell)
    nbformat.write(book, path)
    return path


def outputs(path) -> str:
    book = nbformat.read(path, as_version=4)
    return "".join(out.get("text", "") for cell in book.cells for out in cell.get("outputs", []))


def test_parameters_reach_the_notebook_and_the_source_stays(tmp_path):
    """Whatever letters are in its path: papermill takes braces for parameters."""
    folder = tmp_path / "a {b} ü"
    folder.mkdir()
    notebook = write(folder / "n.ipynb", 'profile = "release"\noverwrite = False', "print(profile, overwrite)")
    before = notebook.read_bytes()
    copy = folder / "copies {0}" / "copy.ipynb"
    done = reproduce.run_notebook(notebook, copy, {"profile": "mine", "overwrite": True})
    assert outputs(done.copy) == "mine True\n"
    assert notebook.read_bytes() == before
    assert done.seconds > 0


def test_two_notebooks_run_at_once(tmp_path):
    """Each kernel has sockets of its own; with names in common one would die of the other's signatures."""
    notebook = write(tmp_path / "n.ipynb", 'profile = ""', "import time; time.sleep(2); print(profile)")
    code = "import sys; from pathlib import Path; from persodpo.reproduce import run_notebook\n"
    code += "run_notebook(Path(sys.argv[1]), Path(sys.argv[2]), {'profile': sys.argv[2]})"
    copies = [tmp_path / f"copy{number}.ipynb" for number in range(2)]
    running = [subprocess.Popen([sys.executable, "-c", code, notebook, copy], cwd=PROJECT) for copy in copies]
    assert [process.wait(timeout=120) for process in running] == [0, 0]
    assert [outputs(copy) for copy in copies] == [f"{copy}\n" for copy in copies]


@pytest.mark.parametrize(
    ("tags", "says"),
    [
        (("parameters",), r"no parameter 'profil'; its parameters cell sets profile"),
        ((), "0 cells tagged 'parameters'"),
    ],
)
def test_what_papermill_only_warns_of_is_an_error(tmp_path, tags, says):
    notebook = write(tmp_path / "n.ipynb", 'profile = "release"', "1", tags=tags)
    with pytest.raises(PersodpoError, match=says):
        reproduce.run_notebook(notebook, tmp_path / "copy.ipynb", {"profil": "mini"})
    notebook.write_text("not JSON")
    with pytest.raises(PersodpoError, match="cannot be read as a notebook"):
        reproduce.run_notebook(notebook, tmp_path / "copy.ipynb", {})
    assert not (tmp_path / "copy.ipynb").exists()


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("b = a / 0", r"n.ipynb failed in cell \[3\](.|\n)*    b = a / 0(.|\n)*ZeroDivisionError: division by zero"),
        ("import os; os._exit(9)", "its kernel died"),
    ],
)
def test_the_failing_cell_and_its_error_are_shown_and_the_copy_kept(tmp_path, fault, says):
    notebook = write(tmp_path / "n.ipynb", "a = 1", "print('before')", fault, "print('after')")
    with pytest.raises(PersodpoError, match=says):
        reproduce.run_notebook(notebook, tmp_path / "copy.ipynb", {})
    assert outputs(tmp_path / "copy.ipynb").startswith("before")


def test_everything_is_checked_before_anything_runs(tmp_path, profile):
    mark = f"open({str(tmp_path / 'ran')!r}, 'w')"
    good = write(tmp_path / "01_good.ipynb", 'profile = ""\noverrides = []\noverwrite = False', mark)
    bad = write(tmp_path / "02_bad.ipynb", 'profile = ""', "1")
    source = tmp_path / "profile.yaml"
    source.write_text(profile.to_yaml())
    with pytest.raises(PersodpoError, match=r"02_bad.ipynb has no parameter"):
        list(reproduce.reproduce(str(source), notebooks=[good, bad]))
    assert not (tmp_path / "ran").exists()
    (done,) = reproduce.reproduce(str(source), notebooks=[good])
    assert (tmp_path / "ran").exists()
    assert done.copy == tmp_path / "runs" / "release" / "notebooks" / "01_good.ipynb"


@pytest.mark.slow
def test_notebooks_whose_stages_have_nothing_to_do_run_two_at_a_time(tmp_path, profile, monkeypatch):
    """Each of two waits for the other; both are told in order, and one that fails ends the run and its neighbour."""
    source = tmp_path / "profile.yaml"
    source.write_text(profile.to_yaml())
    parameters = 'profile = ""\noverrides = []\noverwrite = False'
    wait = "import time; from pathlib import Path; (here := Path({here!r})).touch()\n"
    wait += "while not Path({there!r}).exists() and time.sleep(0.1) is None: pass\nprint(here.name)"
    places = [str(tmp_path / name) for name in ("a", "b")]
    books = [
        write(tmp_path / f"0{number}.ipynb", parameters, wait.format(here=places[number], there=places[1 - number]))
        for number in range(2)
    ]
    fails = write(tmp_path / "02.ipynb", parameters, "1 / 0")
    number = f"import os; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))"
    endless = write(tmp_path / "03.ipynb", parameters, number, "import time; time.sleep(600)")
    copies = RunFolder(profile).notebooks
    copies.mkdir(parents=True)
    for book in (*books, fails, endless):  # those of an earlier run
        (copies / book.name).touch()
    monkeypatch.setattr(stages, "nothing_to_do", lambda _: True)
    assert [outputs(done.copy) for done in reproduce.reproduce(str(source), notebooks=books)] == ["a\n", "b\n"]
    with pytest.raises(PersodpoError, match=r"02\.ipynb failed in cell"):
        list(reproduce.reproduce(str(source), notebooks=[fails, endless]))
    kernel = tmp_path / "pid"
    until = time.monotonic() + 20
    while kernel.exists() and is_running(int(kernel.read_text() or 0)) and time.monotonic() < until:
        time.sleep(0.2)
    assert time.monotonic() < until, "its kernel lives on"


@pytest.mark.slow
def test_notebooks_run_on_a_corrected_profile(release_run, tmp_path):
    """Every correction at once: the notebook of pairs holds, and the audit still judges the tables as released."""
    source = tmp_path / "profile.yaml"
    source.write_text(release_run.profile.to_yaml())
    overrides = [
        f"home={tmp_path}",
        "name=corrected",
        "corrections=all",
    ]
    chosen = [path for path in reproduce.notebook_files() if path.name[:2] in {"03", "07"}]
    assert len(list(reproduce.reproduce(str(source), overrides, notebooks=chosen))) == 2
    assert (tmp_path / "runs" / "corrected" / "pairs" / "perso.parquet").exists()
    assert (tmp_path / "runs" / "corrected-as-released" / "audit" / "findings.parquet").exists()


@pytest.mark.slow
def test_papermill_by_itself(release_run, tmp_path):
    """The papermill command of docs/run-folder.md, on a profile in a temporary folder."""
    source = tmp_path / "profile.yaml"
    source.write_text(release_run.profile.to_yaml())
    papermill = str(Path(sys.executable).with_name("papermill"))
    command = [papermill, "notebooks/03_build_pairs.ipynb", str(tmp_path / "out.ipynb"), "-p", "profile", str(source)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT, check=False)
    assert done.returncode == 0, done.stderr
    assert "Passed unknown parameter" not in done.stderr
    assert "perso: 9,184 pairs by hand and by the package" in outputs(tmp_path / "out.ipynb")
