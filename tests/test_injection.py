from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from napari_xanes_tomo import open_series
from napari_xanes_tomo.cli import app
from napari_xanes_tomo.injection import recover_jitter, recover_registration
from napari_xanes_tomo.model import XanesTomoError
from napari_xanes_tomo.phantom import TwinParameters, write_twin


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    p = TwinParameters(n=128, n_angles=72, energies_ev=(8570.0,), grains=60, flats_per_set=4)
    return write_twin(tmp_path_factory.mktemp("injection") / "twin", parameters=p)


def test_known_displacements_and_bad_frames_are_found_again(twin: Path) -> None:
    (scan,) = open_series(twin).scans
    found = recover_jitter(scan, shift_px=12.0, bad_frames=6)
    assert found.injected[np.isfinite(found.injected[:, 0])].std(axis=0) == pytest.approx([1.5, 1.5], rel=0.3)
    assert (found.error_px < 0.06).all()
    assert len(found.bad) == 6
    assert found.missed == {}
    assert found.wrongly_flagged == {}
    assert np.isnan(found.found[list(found.bad)]).all()
    assert "bad frames: 6 of 6 found, 0 of 66 others" in found.text()


def test_a_displacement_that_is_not_found_shows(twin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from napari_xanes_tomo import injection

    (scan,) = open_series(twin).scans
    run, calls = injection.run_jitter, []

    def twice(*args: object, **more: object) -> object:  # answers with what was found the first time
        calls.append(run(*args, **more) if not calls else calls[0])  # type: ignore[arg-type]
        return calls[-1]

    monkeypatch.setattr(injection, "run_jitter", twice)
    found = recover_jitter(scan, shift_px=12.0, bad_frames=2)
    assert (found.error_px > 1.0).all()
    assert len(found.missed) == 2


def test_more_bad_frames_than_there_can_be(twin: Path) -> None:
    (scan,) = open_series(twin).scans
    with pytest.raises(XanesTomoError, match="a quarter of 72"):
        recover_jitter(scan, bad_frames=60)


def test_on_the_command_line(twin: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["test", str(twin), "--energy", "8500", "--bad", "1"])
    assert (result.exit_code, "8570 eV" in result.stdout) == (0, True)
    (tmp_path / "empty").mkdir()
    result = CliRunner().invoke(app, ["test", str(tmp_path / "empty")])
    assert result.exit_code == 1


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    p = TwinParameters(n=96, n_angles=48, energies_ev=(8400.0, 8570.0), grains=60, flats_per_set=4)
    return write_twin(tmp_path_factory.mktemp("two") / "twin", parameters=p)


def test_displacements_and_a_scale_are_found_against_the_reference(two: Path) -> None:
    scan, reference = open_series(two).scans
    found = recover_registration(scan, reference, shift_px=12.0)
    assert found.injected.std(axis=0) == pytest.approx([1.1, 1.1], rel=0.4)
    assert (found.error_px < 0.1).all()
    assert (np.abs(found.common_px) < 0.06).all()
    assert found.scale_found == pytest.approx(1.003, abs=max(5e-4, 3 * found.scale_sigma))
    assert "scale: 1.00300 put in" in found.text()


def test_the_reference_is_not_registered_to_itself(two: Path) -> None:
    _, reference = open_series(two).scans
    with pytest.raises(XanesTomoError, match="choose another energy"):
        recover_registration(reference, reference)
    result = CliRunner().invoke(app, ["test", str(two), "--registration", "--energy", "8570"])
    assert result.exit_code == 1
