"""The applications of attention: each example runs, and, trained in full, shows the gain that it claims."""

import pytest
import torch

from example import example_module

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = ("biology", "language", "recommendation", "speech", "time_series", "vision")


@pytest.fixture
def application(request):
    """The module examples/NAME.py of the test's parameter."""
    with example_module(request.param) as module:
        yield module


def of(name):
    return pytest.mark.parametrize("application", [name], indirect=True)


@pytest.mark.parametrize("application", NAMES, indirect=True)
def test_quick_form_runs(application, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    outcome = application.main(["--quick", "--steps", "8", "--out", str(tmp_path)])
    assert outcome.losses.keys() == {application.PLAIN, application.OURS}
    for losses in outcome.losses.values():
        assert len(losses) == 8 and losses[-1] < losses[0]
    printed = capsys.readouterr().out
    assert application.PLAIN in printed and application.OURS in printed
    assert (tmp_path / f"{application.__name__}.png").stat().st_size > 10_000


@of("vision")
def test_steps_must_be_positive(application, capsys):
    with pytest.raises(SystemExit):
        application.main(["--steps", "0"])
    assert "--steps 0: must be at least 1" in capsys.readouterr().err


@of("recommendation")
def test_packed_and_padded_sessions_give_the_same_logits(application):
    """Apart from positions, which one of the models has, packing changes nothing."""
    batch = application.batch_of(torch.arange(application.ITEMS).roll(1), 6, torch.Generator().manual_seed(0))
    model = application.models()[application.OURS].double()
    with torch.no_grad():
        packed, following = application.guesses(application.OURS, model, batch)
        padded, also_following = application.guesses(application.PLAIN, model, batch)
    assert torch.equal(following, also_following)
    torch.testing.assert_close(packed, padded, rtol=0, atol=1e-12)


@of("biology")
def test_contacts_of_the_family_fit(application):
    this = application.family()
    assert this.contacts.unique().numel() == 2 * application.CONTACTS
    assert torch.equal(this.partner[this.partner], torch.arange(application.AMINO))
    residues = this.sequences(2000, torch.Generator().manual_seed(0))
    left, right = this.contacts.T
    assert (this.partner[residues[:, left]] == residues[:, right]).float().mean() == pytest.approx(0.905, abs=0.01)
    perfect = torch.zeros(application.COLUMNS, application.COLUMNS)
    perfect[left, right] = 1.0
    assert application.precision(perfect, this) == 1.0 and application.precision(perfect.roll(1, 1), this) < 0.2


@of("speech")
def test_vowels_are_where_they_are_said_to_be(application):
    """In each vowel the spectrum is strongest, beyond the fundamental, near one of its formants."""
    sound = application.record(8, 1, torch.Generator().manual_seed(0))
    bin_width = application.RATE / 2 / application.BINS
    for vowel, formants in enumerate(application.VOWELS.values()):
        mean = sound.spectra[sound.vowels == vowel].mean(0)
        loudest = (mean[4:].argmax().item() + 4.5) * bin_width
        assert min(abs(loudest - formant) for formant in formants) < 2.5 * bin_width, vowel


@of("time_series")
def test_generated_series_is_said_to_be_generated(application, monkeypatch):
    monkeypatch.setattr(application.importlib.util, "find_spec", lambda name: None)
    ppm, year, data = application.co2()
    assert data == "a generated series" and ppm.shape == year.shape and ppm.isfinite().all()
    assert application.detection(torch.zeros(4), torch.full((4,), 2.0)) == 1.0


# --- in full, each about a minute of a core ---------------------------------------------------------------------------


@pytest.mark.slow
@of("vision")
def test_neighbourhoods_read_digits_better(application, tmp_path):
    outcome = application.main(["--out", str(tmp_path)])
    assert outcome.accuracy[application.OURS] > 0.87
    assert outcome.accuracy[application.OURS] > outcome.accuracy[application.PLAIN] + 0.03
    assert outcome.pairs[application.OURS] < 0.5


@pytest.mark.slow
@of("biology")
def test_a_pair_bias_finds_the_contacts(application, tmp_path):
    outcome = application.main(["--out", str(tmp_path)])
    assert outcome.precision[application.OURS] == 1.0 and outcome.accuracy[application.OURS] > 0.87
    assert outcome.accuracy[application.OURS] > outcome.accuracy[application.PLAIN] + 0.1


@pytest.mark.slow
@of("language")
def test_alibi_reads_on_where_it_was_not_trained(application, tmp_path):
    outcome = application.main(["--out", str(tmp_path)])
    plain, ours = (list(outcome.held_back[name].values()) for name in (application.PLAIN, application.OURS))
    assert max(ours) < ours[0] + 0.02 and plain[-1] > plain[0] + 0.1 and ours[-1] < plain[-1] - 0.2


@pytest.mark.slow
@of("speech")
def test_a_window_hears_long_recordings_as_well_as_short_ones(application, tmp_path):
    outcome = application.main(["--out", str(tmp_path)])
    plain, ours = outcome.accuracy[application.PLAIN], outcome.accuracy[application.OURS]
    assert ours[1] > plain[1] and ours[10] > ours[1] - 0.03 and ours[10] > plain[10] + 0.1


@pytest.mark.slow
@of("recommendation")
def test_packed_sessions_with_recency_are_cheaper_and_better(application, tmp_path):
    outcome = application.main(["--out", str(tmp_path)])
    plain, ours = outcome.hits[application.PLAIN], outcome.hits[application.OURS]
    assert ours[0] > plain[0] and ours[1] > plain[1] + 0.08
    assert outcome.tokens[application.OURS] < 0.3 * outcome.tokens[application.PLAIN]


@pytest.mark.slow
@of("time_series")
def test_a_bias_by_distance_learns_the_year_sooner(application, tmp_path):
    outcome = application.main(["--out", str(tmp_path)])
    early = {name: sum(losses[50:100]) for name, losses in outcome.losses.items()}
    assert early[application.OURS] < 0.9 * early[application.PLAIN]
    # a generated series is as good as periodic: what was a year ago cannot be bettered
    best = outcome.ppm[application.OURS] < min(outcome.ppm[application.PLAIN], outcome.ppm[application.NAIVE])
    assert "generated" in outcome.data or best
    assert "generated" in outcome.data or outcome.detected[application.OURS] > outcome.detected[application.NAIVE]
