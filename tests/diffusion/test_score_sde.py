"""The score SDEs, their samplers and correctors against vectors of the public score_sde program, in float64."""

import pytest
import torch

from fastdiff.diffusion import VE, VP, Discrete, Langevin, SubVP, ancestral, euler_maruyama, reverse_diffusion, sample
from fastdiff.diffusion.sampling import advance, rows

N = 1000
SDES = {"ve": VE(), "vp": VP(), "subvp": SubVP()}
SHORT = {"ve": (VE(), 1e-5), "vp": (VP(0.1, 3.0), 1e-3), "subvp": (SubVP(), 1e-3)}
PREDICTORS = dict(euler_maruyama=euler_maruyama, reverse_diffusion=reverse_diffusion, ancestral_sampling=ancestral)


@pytest.fixture(scope="module")
def file(golden):
    return golden("score_sde")


@pytest.fixture(params=SDES)
def case(request, file):
    """(name, sde, t, x, score)"""
    return request.param, SDES[request.param], file[f"in/{request.param}/t"], file["in/x"], file["in/score"]


def _step(plan, pred, x, t, corrector=None):
    """A function of noises: one step (or corrector) of each sample, by a row of the plan each."""
    table = torch.cat([table[:, :1] for table in rows(plan, x)[1][:-1]], 1)

    def step(*noises):
        return advance(lambda z, time: pred, plan, corrector, None, None, None, False, x, t, table, None, *noises)[0]

    return step


@pytest.fixture
def grid(monkeypatch):
    """Makes the samplers' grid the given times, and one more, for the last step is silent."""
    return lambda sde, t: monkeypatch.setattr(type(sde), "times", lambda self, n, last: torch.cat([t, t[:1]]))


def test_moments(case, file, near):
    name, sde, t, x, _ = case
    signal, sigma = sde.marginal(t)
    near(signal.view(-1, 1, 1, 1) * x, file[f"out/{name}/marginal_mean"])
    near(sigma, file[f"out/{name}/marginal_std"])
    near(sde.diffusion(t), file[f"out/{name}/diffusion"])
    near(sde.drift(t).view(-1, 1, 1, 1) * x, file[f"out/{name}/drift"])
    f, G = sde.discretize(t, N)
    near(f.view(-1, 1, 1, 1) * x, file[f"out/{name}/discretize_f"])
    near(G, file[f"out/{name}/discretize_G"])
    assert torch.equal(sde.index(t, N), file[f"out/{name}/index"])
    if name == "ve":
        near(sde.sigmas(N), file["const/ve/discrete_sigmas"])
    if name == "vp":
        near(sde.betas(N), file["const/vp/discrete_betas"])
        near(Discrete(sde.betas(N)).gamma, file["const/vp/alphas_cumprod"])


def test_scores(case, file, near):
    name, sde, t, *_ = case
    near(sde.told(t), file[f"out/{name}/score_fn/continuous/labels"])
    net = file["in/model_output"]
    score = net if name == "ve" else net / -sde.marginal(t)[1].view(-1, 1, 1, 1)
    near(score, file[f"out/{name}/score_fn/continuous/score"])


@pytest.mark.parametrize("prediction", ["score", "eps"])
@pytest.mark.parametrize("predictor", PREDICTORS)
def test_predictors(case, file, near, grid, predictor, prediction):
    name, sde, t, x, score = case
    if f"out/{name}/predictor/{predictor}/x" not in file:
        with pytest.raises(ValueError, match="ancestral: sde wants"):
            ancestral(sde, N)
        return
    grid(sde, t)
    pred = score * -sde.marginal(t)[1].view(-1, 1, 1, 1) if prediction == "eps" else score
    step = _step(PREDICTORS[predictor](sde, N, prediction=prediction), pred, x, t)
    near(step(), file[f"out/{name}/predictor/{predictor}/x_mean"], 1e-10)
    near(step(file["in/noise"][0]), file[f"out/{name}/predictor/{predictor}/x"], 1e-10)
    if predictor == "reverse_diffusion":
        step = _step(reverse_diffusion(sde, N, prediction=prediction, flow=True), pred, x, t)
        near(step(), file[f"out/{name}/predictor/reverse_diffusion_flow/x"], 1e-10)


@pytest.mark.parametrize("kind", ["langevin", "ald"])
@pytest.mark.parametrize("inner", [1, 2])
def test_correctors(case, file, near, grid, kind, inner):
    name, sde, t, x, score = case
    if name == "subvp":
        return  # the program has none
    grid(sde, t)
    plan = reverse_diffusion(sde, N, prediction="score", flow=True)
    plan = plan._replace(to_x0=torch.ones_like(plan.to_x0), to_eps=torch.zeros_like(plan.to_eps))  # the corrector alone
    step = _step(plan, score, x, t, Langevin(0.16, inner, annealed=kind == "ald"))
    near(step(*file["in/noise"][:inner]), file[f"out/{name}/corrector/{kind}_n{inner}/x"], 1e-10)


@pytest.mark.parametrize("run", ["euler_maruyama_none", "ancestral_sampling_none", "reverse_diffusion_langevin"])
@pytest.mark.parametrize("name", SHORT)
def test_runs(file, near, draws, name, run):
    where = f"out/{name}/pc/{run}"
    if f"{where}/x" not in file:
        return  # the program has none
    sde, last = SHORT[name]
    told, outputs = [], iter(file[f"in/{name}/pc_model_output"])
    draws(file[f"in/{name}/pc_noise"])

    def net(z, time):
        told.append(time)
        return next(outputs)

    prediction = "score" if name == "ve" else "eps"
    predictor, corrector = run.rsplit("_", 1)
    plan = PREDICTORS[predictor](sde, 5, last=last, prediction=prediction)
    start = file[f"in/{name}/pc_prior"] * (50 if name == "ve" else 1)
    got = sample(net, start, plan, corrector=Langevin(0.16) if corrector == "langevin" else None)
    near(got, file[f"{where}/x"], 1e-10)
    near(torch.stack(told), file[f"{where}/labels"])


@pytest.mark.parametrize("name", SDES)
def test_losses(file, near, name):
    """The continuous losses, by `diffuse` and `target`: |net + eps|^2 (VE: |sigma net + eps|^2), weighted by g^2 / sigma^2 or not."""
    sde, x, noise = SDES[name], file["in/batch"], file["in/noise"][1]
    t = file[f"in/{name}/loss_u"] * (1 - 1e-5) + 1e-5
    sigma = sde.marginal(t)[1].view(-1, 1, 1, 1)
    net = file["in/loss_model_output"]
    score = net if name == "ve" else -net / sigma
    error = (score - sde.target(x, noise, t, "score")).square().flatten(1)
    near(sde.told(t), file[f"out/{name}/loss/labels"])
    plain, likelihood = sigma.flatten().square(), sde.diffusion(t).square()
    for reduce, ending in ((error.mean(1), "mean"), (0.5 * error.sum(1), "half_sum")):
        near((reduce * plain).mean(), file[f"out/{name}/loss/{ending}_plain"])
        near((reduce * likelihood).mean(), file[f"out/{name}/loss/{ending}_likelihood"], 1e-10)
